"""What a request may say, and the error of what it may not."""

import json

import pytest

from lora_jax.models.text.byte_tokenizer import byte_tokenizer
from lora_jax.serving.asked import Reader
from lora_jax.serving.catalogue import Catalogue
from lora_jax.serving.choosing import Choosing
from lora_jax.serving.errors import RequestError
from lora_jax.serving.served import Served

TOKENIZER = byte_tokenizer()
SERVED = {x: Served(x, TOKENIZER, frozenset()) for x in ("base", "law")}
READER = Reader(Catalogue(list(SERVED.values())).find, context=50, vocabulary=len(TOKENIZER))
TEXT = {"model": "law", "prompt": "Hello"}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
USER = CHAT["messages"][0]


def read(request, chat=None):
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    return READER.read(body, "messages" in request if chat is None else chat)


def refused(request, chat=None):
    with pytest.raises(RequestError) as error:
        read(request, chat)
    assert error.value.body()["error"]["message"] == error.value.message
    assert "\n" not in error.value.message
    return error.value


def test_a_text_as_openai_defines_it():
    asked = read(TEXT)
    assert asked.served is SERVED["law"] and not asked.chat and not asked.stream
    assert asked.prompts == [TOKENIZER.encode_prompt("Hello")] and asked.most == [16]
    (c,) = asked.choosing
    assert c == Choosing(temperature=1, seed=c.seed) and read(TEXT).choosing[0].seed != c.seed
    more = {"max_tokens": 3, "temperature": 0, "top_p": 0.5, "seed": -7, "stop": "x", "logprobs": 4}
    asked = read(TEXT | more | {"n": 1, "user": "me", "echo": False, "suffix": None})
    assert (asked.most, asked.stops, asked.logprobs) == ([3], ("x",), True)
    assert asked.choosing == [Choosing(top_p=0.5, seed=-7, top=4)]


def test_how_tokens_are_chosen():
    """OpenAI's fields, and those that vLLM and mlx-lm add; each choice has its own seed."""
    given = {"top_k": 5, "min_p": 0.1, "presence_penalty": -2, "frequency_penalty": 0.5, "n": 3}
    given |= {"repetition_penalty": 1.2, "logit_bias": {"0": -100, "259": 2.5}, "seed": 2**63 - 2}
    chosen = {"temperature": 1.0, "top_k": 5, "min_p": 0.1, "presence": -2.0, "frequency": 0.5}
    chosen |= {"repetition": 1.2, "bias": ((0, -100.0), (259, 2.5))}
    asked = read(CHAT | given)
    seeds = 2**63 - 2, 2**63 - 1, -(2**63)
    assert asked.choosing == [Choosing(**chosen, seed=seed) for seed in seeds]
    jobs = read(TEXT | given | {"prompt": ["a", "b"], "best_of": 3}).jobs(lambda *_: None)
    assert [(x.ids, x.choosing.seed) for x in jobs] == [
        (TOKENIZER.encode_prompt(x), seed) for x in "ab" for seed in seeds
    ]
    for every in (0, -1, None):
        assert read(TEXT | {"top_k": every, "logit_bias": {}}).choosing[0].top_k == 0


def test_an_echo():
    ids = TOKENIZER.encode_prompt("ab")
    asked = read(TEXT | {"prompt": ["x<|end|>", ids], "n": 2, "echo": True})
    assert [asked.echo_of(n) for n in range(4)] == ["x<|end|>"] * 2 + ["ab"] * 2
    assert read(TEXT | {"prompt": ids, "echo": True}).echo == ["ab"] and read(CHAT).echo == [""]


def test_prompts_of_every_form():
    ids = TOKENIZER.encode_prompt("ab")
    for prompt, wanted in (
        (["ab"], [ids]),
        (ids, [ids]),
        ([ids, ids], [ids, ids]),
        (["ab", ids], [ids, ids]),
    ):
        assert read(TEXT | {"prompt": prompt}).prompts == wanted


def test_a_chat_as_openai_defines_it():
    asked = read(CHAT)
    text = TOKENIZER.chat([USER], add_generation_prompt=True)
    assert asked.chat and asked.prompts == [TOKENIZER.encode(text)]
    assert asked.most == [50 - len(asked.prompts[0])]
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    asked = read(CHAT | stream | {"max_completion_tokens": 5, "logprobs": True, "top_logprobs": 2})
    assert asked.stream and asked.usage and asked.most == [5] and asked.choosing[0].top == 2
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert read(CHAT | {"messages": [{"role": "user", "content": parts}]}).prompts == asked.prompts


BAD = {
    "no JSON": (b"{", "not valid JSON"),
    "NaN": (b'{"temperature": NaN}', "NaN is not a JSON number"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "not valid JSON"),
    "no object": (b"[1]", "must be a JSON object"),
    "no model": ({"prompt": "x"}, "model must be a string"),
    "model": (TEXT | {"model": 3}, "model must be a string that is not empty, got 3"),
    "unknown field": (TEXT | {"top_n": 3}, "'top_n'; this server takes model, max_tokens"),
    "other kind's field": (TEXT | {"top_logprobs": 1}, "'top_logprobs'"),
    "n": (TEXT | {"n": 0}, "n must be an integer from 1 to 128, got 0"),
    "n as a bool": (TEXT | {"n": True}, "n must be"),
    "best_of": (TEXT | {"n": 2, "best_of": 3}, "best_of 3 is not supported with n 2; leave it out"),
    "best_of of chat": (CHAT | {"best_of": 1}, "'best_of'"),
    "echo": (TEXT | {"echo": 1}, "echo must be true or false"),
    "echo and logprobs": (TEXT | {"echo": True, "logprobs": 0}, "echo with logprobs is not"),
    "top_k": (TEXT | {"top_k": -2}, "top_k must be an integer of -1 or more, got -2"),
    "min_p": (TEXT | {"min_p": 2}, "min_p must be a number from 0 to 1"),
    "penalty": (TEXT | {"presence_penalty": 2.5}, "presence_penalty must be a number from -2 to 2"),
    "other penalty": (TEXT | {"frequency_penalty": "x"}, "frequency_penalty must be"),
    "repetition": (
        TEXT | {"repetition_penalty": 0},
        "repetition_penalty must be a number from 0.01",
    ),
    "bias": (TEXT | {"logit_bias": [1]}, "logit_bias must be an object of up to 1,024 token ids"),
    "biases": (TEXT | {"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias must be"),
    "bias of no token": (TEXT | {"logit_bias": {"01": 1}}, "'01' is not a token id"),
    "bias outside": (TEXT | {"logit_bias": {"260": 1}}, "is an integer from 0 to 259 as a string"),
    "bias too large": (
        TEXT | {"logit_bias": {"7": 101}},
        "logit_bias[7] must be a number from -100",
    ),
    "tools": (CHAT | {"tools": [{"type": "function"}]}, "tools is not supported"),
    "format": (CHAT | {"response_format": {"type": "json_object"}}, "response_format is not"),
    "temperature": (TEXT | {"temperature": -1}, "temperature must be a number from 0 to 2, got -1"),
    "temperature as text": (TEXT | {"temperature": "hot"}, "temperature must be"),
    "temperature as a bool": (TEXT | {"temperature": True}, "temperature must be"),
    "huge": (TEXT | {"temperature": 10**400}, "temperature must be"),
    "top_p": (TEXT | {"top_p": 1.5}, "top_p must be a number from 0 to 1"),
    "max_tokens 0": (TEXT | {"max_tokens": 0}, "max_tokens must be an integer of 1 or more, got 0"),
    "max_tokens as a float": (TEXT | {"max_tokens": 1.5}, "max_tokens must be"),
    "two limits": (CHAT | {"max_tokens": 1, "max_completion_tokens": 2}, "give one of them"),
    "seed": (TEXT | {"seed": 2**63}, "seed must be an integer"),
    "stop": (TEXT | {"stop": [""]}, "stop must be a string or a list of up to 16"),
    "stops": (TEXT | {"stop": ["x"] * 17}, "stop must be"),
    "stream": (TEXT | {"stream": 1}, "stream must be true or false"),
    "stream_options": (TEXT | {"stream_options": {}}, "needs stream to be true"),
    "usage": (TEXT | {"stream": True, "stream_options": {"x": 1}}, "stream_options must be"),
    "logprobs": (TEXT | {"logprobs": 21}, "logprobs must be an integer from 0 to 20"),
    "logprobs of chat": (CHAT | {"logprobs": 3}, "logprobs must be true or false"),
    "top_logprobs": (CHAT | {"top_logprobs": 3}, "needs logprobs to be true"),
    "no prompt": ({"model": "base", "prompt": None}, "prompt must be"),
    "no prompts": (TEXT | {"prompt": []}, "prompt must be a text, token ids, or a list"),
    "empty": (TEXT | {"prompt": ""}, "the prompt has no tokens"),
    "prompt as a number": (TEXT | {"prompt": 3}, "prompt must be"),
    "prompt as an object": (TEXT | {"prompt": [{}]}, "prompt must be"),
    "mixed": (TEXT | {"prompt": [3, "a"]}, "prompt must be"),
    "ids": (TEXT | {"prompt": [3, 260]}, "outside of the vocabulary, whose ids are 0 to 259"),
    "negative ids": (TEXT | {"prompt": [-1]}, "outside of the vocabulary"),
    "surrogate": (TEXT | {"prompt": "\ud800"}, "prompt cannot be encoded"),
    "no messages": (CHAT | {"messages": []}, "messages must be a list of at least one"),
    "message": (CHAT | {"messages": ["Hi"]}, "messages[0] must be an object"),
    "role": (
        CHAT | {"messages": [USER, USER | {"role": "bot"}]},
        "messages[1].role must be one of",
    ),
    "role as a list": (CHAT | {"messages": [USER | {"role": []}]}, "messages[0].role must be"),
    "content": (CHAT | {"messages": [USER | {"content": None}]}, "messages[0].content must be"),
    "image": (
        CHAT | {"messages": [USER | {"content": [{"type": "image_url"}]}]},
        "content must be",
    ),
    "calls": (CHAT | {"messages": [USER | {"tool_calls": [1]}]}, "'tool_calls', which this server"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(case):
    request, said = BAD[case]
    error = refused(request, chat=False if isinstance(request, bytes) else None)
    assert said in error.message and error.status == 400


def test_an_unknown_model():
    error = refused(TEXT | {"model": "lax"})
    assert (error.status, error.code) == (404, "model_not_found")
    assert error.message == "the model 'lax' does not exist; this server has base, law"


def test_a_context_that_is_too_long():
    error = refused(TEXT | {"max_tokens": 46})
    assert (error.status, error.code) == (400, "context_length_exceeded")
    assert (
        "maximum context length is 50 tokens, but the request has 51: 5 in the prompt and 46 for"
        in (error.message)
    )
    assert read(TEXT | {"max_tokens": 45}).most == [45]
    assert (
        "has 51: 50 in the prompt and 1"
        in refused(TEXT | {"prompt": "x" * 50, "max_tokens": 1}).message
    )
    assert (
        "in the prompt and 1 for"
        in refused(CHAT | {"messages": [USER | {"content": "x" * 50}]}).message
    )


def test_a_model_without_a_chat_template():
    import dataclasses

    plain = Served("plain", dataclasses.replace(TOKENIZER, chat_template=None), frozenset())
    reader = Reader(Catalogue([plain]).find, context=50, vocabulary=260)
    with pytest.raises(RequestError, match="cannot be encoded for plain: this model has no chat"):
        reader.read(json.dumps(CHAT | {"model": "plain"}).encode(), chat=True)
