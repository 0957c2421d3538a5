"""The forms of the branch that tests run: each backend's, each switch on or off alone."""

import dataclasses

from lora_jax.engine.forms import PLAIN, Forms

NAMES = [field.name for field in dataclasses.fields(Forms)]
ALL_ON = Forms(*(True for _ in NAMES))
GPU = Forms.for_backend("gpu")
FORMS = [
    *(Forms.for_backend("cpu"), Forms.for_backend("tpu"), GPU, PLAIN, ALL_ON),
    *(dataclasses.replace(PLAIN, **{name: True}) for name in NAMES),
    *(dataclasses.replace(ALL_ON, **{name: False}) for name in NAMES),
]
