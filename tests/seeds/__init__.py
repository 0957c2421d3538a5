"""Every feature that the documents this project grew from show or claim, a test for each.

There are four documents, and a file of tests for each: the page of Zeta's `Lora` class, the README
of a PyTorch implementation, a page of notes on LoRA, and a notebook that builds a LoRA layer. Every
docstring quotes in a few words what its test stands for. How the same things behave at their edges
is tested beside their modules.
"""
