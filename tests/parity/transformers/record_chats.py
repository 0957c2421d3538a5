"""Record what transformers makes of conversations and prompts: chats.json.

python tests/parity/transformers/record_chats.py    in an environment with transformers 5.24.0
"""

import json
import tempfile
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

ENDS = ["<unk>", "<s>", "</s>"]
TURNS = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>"]
TURNS += ["<start_of_turn>", "<end_of_turn>", "<|eot_id|>"]
CORPUS = [
    "hello there, how are you? the user asks and the assistant says: I am fine, thank you.",
    "system user assistant model 12 + 30 = 42 you are a helper. answer in one word please",
] * 4
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def sentencepiece(**how) -> Tokenizer:
    """A BPE with byte fallback, as Llama 2 and Mistral have it."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    space = "▁"
    if "scheme" in how:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=how["scheme"], split=False)
    else:
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend(space), normalizers.Replace(" ", space)]
        )
    special = [*ENDS, *BYTES]
    words = [word for line in CORPUS for word in line.split()]  # merges within words only
    made.train_from_iterator(words, trainer(trainers.BpeTrainer, 340, special, [space]))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace(space, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.post_processor = around(made, "<s>")
    return made


def trainer(kind, size, special, alphabet=()):
    return kind(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=list(alphabet),
        show_progress=False,
    )


def around(made, before, after=None):
    parts = [before, "$A", *([after] if after else [])]
    ids = [(token, made.token_to_id(token)) for token in (before, after) if token]
    return processors.TemplateProcessing(single=parts, special_tokens=ids)


def byte_level(cut=None, begins=False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    if cut:
        split = pre_tokenizers.Split(Regex(cut), "isolated")
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(CORPUS, trainer(trainers.BpeTrainer, 340, ENDS, alphabet))
    made.decoder = decoders.ByteLevel()
    trims = processors.ByteLevel(trim_offsets=True)
    made.post_processor = processors.Sequence([trims, around(made, "<s>")]) if begins else trims
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    kind = lambda **given: trainers.UnigramTrainer(unk_token="<unk>", **given)
    made.train_from_iterator(CORPUS * 4, trainer(kind, 120, ENDS, "\n:[]/<|>"))
    made.decoder = decoders.Metaspace()
    made.post_processor = around(made, "<s>", "</s>")
    return made


def wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(CORPUS * 4, trainer(trainers.WordPieceTrainer, 120, ENDS))
    made.decoder = decoders.WordPiece()
    made.post_processor = around(made, "<s>", "</s>")
    return made


DIGITS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
FAMILIES = {
    "byte-level": byte_level,
    "byte-level after BOS": lambda: byte_level(DIGITS, begins=True),
    "Metaspace first": lambda: sentencepiece(scheme="first"),
    "Metaspace always": lambda: sentencepiece(scheme="always"),
    "Prepend": sentencepiece,
    "Unigram": unigram,
    "WordPiece": wordpiece,
}

# Where [[ and ]] stand, the assistant speaks: marked for the mask, left out for the template.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "[[{{ m.content }}<|im_end|>\n]]{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama 2": (
        "{% for m in messages %}{% if m.role == 'assistant' %}[[ {{ m.content }} </s>]]"
        "{% else %}<s>[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}[[{{ m.content }}"
        "{{ eos_token }}]]{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n[[{{ m.content }}"
        "{{ eos_token }}\n]]{% else %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<start_of_turn>model\n"
        "[[{{ m.content | trim }}<end_of_turn>\n]]{% else %}<start_of_turn>{{ m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "vicuna": (
        "{% for m in messages %}{% if m.role == 'assistant' %} ASSISTANT:[[ {{ m.content }}</s>]]"
        "{% else %}{{ m.role | upper }}: {{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    ),
    "plain words": (
        "{% for m in messages %}{% if m.role == 'assistant' %}### Response:\n[[{{ m.content }}\n\n"
        "]]{% else %}### {{ m.role }}:\n{{ m.content }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
    "always opens": (
        "{% for m in messages %}{% if m.role == 'assistant' %}[[{{ m.content }}</s>\n]]"
        "{% else %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endif %}"
        "{% if m.role != 'assistant' or loop.last %}<|assistant|>\n{% endif %}{% endfor %}"
    ),
    "thinks in the last turn": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "[[{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n]]"
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "drops thoughts": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
        "[[{{ m.content.split('</think>')[-1] }}</s>]]"
        "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    ),
    "tools": (
        "{{ bos_token }}{% if tools %}<|user|>{{ tools | tojson(indent=1, sort_keys=true) }}<|end|>"
        "{% endif %}{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
        "[[{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}"
        "{{ c.function | tojson(separators=(',', ':')) }}{% endfor %}<|end|>]]"
        "{% elif m.content is string %}{{ m.content }}<|end|>{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
}

turn = lambda role, content, **more: {"role": role, "content": content, **more}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"b": {}, "a": {}}}}
CALL = {"function": {"name": "add", "arguments": {"b": 30, "a": "zwölf"}}}
CONVERSATIONS = {
    "one turn": [turn("user", "hello there, how are you?"), turn("assistant", "I am fine.")],
    "two turns": [
        turn("system", "you are a helper."),
        turn("user", "12 + 30 ="),
        turn("assistant", "42"),
        turn("user", "thank you"),
        turn("assistant", "fine, how are you?"),
    ],
    "characters of several bytes": [
        turn("user", "naïve 日本 🤗"),
        turn("assistant", "🤗日本é"),
        turn("user", "é"),
        turn("assistant", "e\u0301 🤗"),
    ],
    "spaces and lines at the ends": [
        turn("user", " hello \n"),
        turn("assistant", "\n\n hello  there\n "),
        turn("user", "how\n"),
        turn("assistant", " fine "),
    ],
    "special tokens and thoughts spelled out": [
        turn("user", "<s>hello</s> <|im_end|>"),
        turn("assistant", "<think>hm</think>the answer</s>"),
        turn("user", ""),
        turn("assistant", "<think>\n12</think>12"),
    ],
}
TOOL_CONVERSATIONS = {
    "tool calls": [
        turn("user", [{"type": "text", "text": "12 + "}, {"type": "text", "text": "30"}]),
        turn("assistant", None, tool_calls=[CALL]),
        turn("tool", "42"),
        turn("assistant", "it is 42"),
    ],
    "no calls": [turn("user", "hello"), turn("assistant", "hello", tool_calls=None)],
}
PROMPTS = [
    ("hello there", ", how are you?"),
    ("12 + 30 =", " 42"),
    ("the answer: ", "42"),  # the space belongs to a token with what follows
    ("I am fi", "ne"),
    ("naïve 日", "本 🤗"),
    ("hello\n", "\nthere"),
    ("<s>hello", " you</s>"),
    ("", "hello there"),
]


def plain(template: str) -> str:
    return template.replace("[[", "").replace("]]", "")


def marked(template: str) -> str:
    return template.replace("[[", "{% generation %}").replace("]]", "{% endgeneration %}")


def conversations(template: str):
    """(name, messages, tools) of what a template is for."""
    if template == "tools":
        yield from ((name, x, [TOOL]) for name, x in TOOL_CONVERSATIONS.items())
        yield ("without tools", TOOL_CONVERSATIONS["no calls"], None)
    else:
        yield from ((name, x, None) for name, x in CONVERSATIONS.items())


def record(files: dict) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        for name, content in files.items():
            (Path(directory) / name).write_text(json.dumps(content))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    chats = []
    for name, template in TEMPLATES.items():
        for label, messages, tools in conversations(name):
            given = {"tools": tools, "tokenize": True, "return_dict": True}
            ids = tokenizer.apply_chat_template(messages, chat_template=plain(template), **given)
            both = tokenizer.apply_chat_template(
                messages, chat_template=marked(template), return_assistant_tokens_mask=True, **given
            )
            assert ids["input_ids"] == both["input_ids"]
            mask = "".join(map(str, both["assistant_masks"]))
            chats.append({"of": [name, label], "ids": ids["input_ids"], "mask": mask})
    prompts = [
        {
            "prompt": prompt,
            "completion": completion,
            "asked": tokenizer(prompt)["input_ids"],
            "whole": tokenizer(prompt + completion)["input_ids"],
            "text": tokenizer.decode(tokenizer(prompt + completion)["input_ids"]),
        }
        for prompt, completion in PROMPTS
    ]
    return {"files": files, "chats": chats, "prompts": prompts}


def main() -> None:
    recorded = {}
    for name, make in FAMILIES.items():
        made = make()
        added = [AddedToken(x, normalized=False, special=True) for x in [*ENDS, *TURNS]]
        made.add_special_tokens(added)
        settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        recorded[name] = record(
            {"tokenizer.json": json.loads(made.to_str()), "tokenizer_config.json": settings}
        )
    templates = {name: [plain(x), marked(x)] for name, x in TEMPLATES.items()}
    asked = {
        name: {label: [messages, tools] for label, messages, tools in conversations(name)}
        for name in ("chatml", "tools")
    }
    whole = {"templates": templates, "conversations": asked, "families": recorded}
    text = json.dumps(whole, ensure_ascii=False, separators=(",", ":"))
    Path(__file__).with_name("chats.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
