"""Record a SentencePiece BPE and what it makes of texts: pieces.json.

Run it in an environment with sentencepiece (recorded with 0.2.3):
`python tests/models/text/record_pieces.py`. It contains the pieces, scores and types as llama.cpp
writes them into a GGUF file, and for each text its ids with a space before it and without.
"""

import io
import json
import pathlib

import sentencepiece

TRAINED_ON = [
    "the quick brown fox jumps over the lazy dog and the other dogs",
    "there is nothing either good or bad, but thinking makes it so",
    "a model, the models; an adapter, the adapters; a token, two tokens",
    "to be, or not to be: that is the question whether it is nobler in the mind",
]
TEXTS = [
    "the models think",
    " two  spaces   and the rest",
    "the quick adapters",
    "naïve 日本語 🤗\tcafé",
    "",
    "x",
    "newline\nand more\n\nthings",
    "to be,  or not the token",
]


def main() -> None:
    found: dict[str, object] = {"texts": TEXTS}
    for name, prefix in (("with", True), ("without", False)):
        stream = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TRAINED_ON * 3),
            model_writer=stream,
            vocab_size=340,
            model_type="bpe",
            byte_fallback=True,
            add_dummy_prefix=prefix,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        model = sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())
        every = range(model.vocab_size())
        kinds = (
            (2, model.IsUnknown),
            (3, model.IsControl),
            (5, model.IsUnused),
            (6, model.IsByte),
        )
        found[name] = {
            "tokens": [model.IdToPiece(i) for i in every],
            "scores": [model.GetScore(i) for i in every],
            "types": [next((kind for kind, of in kinds if of(i)), 1) for i in every],
            "ids": [model.Encode(text) for text in TEXTS],
            "decoded": [model.Decode(model.Encode(text)) for text in TEXTS],
        }
    path = pathlib.Path(__file__).parent / "pieces.json"
    path.write_text(json.dumps(found, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
