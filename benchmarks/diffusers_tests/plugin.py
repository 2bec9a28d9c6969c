"""pytest plugin: diffusers' own pipeline tests, on pipelines that are protected as soon as they are made.

`--amg plain` leaves them as they are, `off` and `closed` protect them, with nothing measured and with gates
that stay closed. The tokenizers and configurations that those tests load from a hub are replaced, all three
times, by tiny local ones.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

LETTERS = [chr(code) for code in range(33, 127)]
LENGTH = 77
PARTS = ("unet", "transformer", "vae", "scheduler")
CLOSED = dict.fromkeys(("threshold", "lambda_min", "lambda_max", "rewind_threshold"), -1e-3)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--amg", choices=("plain", "off", "closed"), default="plain")


def pytest_configure(config: pytest.Config) -> None:
    _serve_locally()
    if config.getoption("--amg") != "plain":
        _protect_all(config.getoption("--amg"))


def _protect_all(how: str) -> None:
    """Every diffusers pipeline that gives images is protected at the end of its `__init__`."""
    import diffusers

    import amg

    folder = Path(tempfile.mkdtemp()) / "noise.amg"
    noise = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    index = amg.Index.build(noise, None, None, folder, progress=False)
    options = {"guard_threshold": None, **CLOSED} if how == "closed" else {"on_memorized": "flag"}
    config = amg.AMGConfig.preset("main" if how == "closed" else "off", **options)
    for name in dir(diffusers):
        kind = getattr(diffusers, name, None) if name.endswith("Pipeline") else None
        if (
            isinstance(kind, type)
            and issubclass(kind, diffusers.DiffusionPipeline)
            and "__init__" in vars(kind)
        ):
            kind.__init__ = _protecting(kind, kind.__init__, index, config)


def _protecting(kind: type, make: Any, index: Any, config: Any) -> Any:
    import amg

    @functools.wraps(make)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        whole = all(getattr(self, name, kind) is not None for name in PARTS)
        if type(self) is kind and whole:  # some tests make one of text encoders alone, which is refused
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                amg.protect(self, index, config)

    return __init__


def _serve_locally() -> None:
    """Tokenizers and T5's configuration, which the tests ask a hub for."""
    import transformers

    for name, local in (
        ("CLIPTokenizer", _clip_tokenizer),
        ("AutoTokenizer", _t5_tokenizer),
        ("AutoConfig", _t5_config),
    ):
        kind = getattr(transformers, name)
        kind.from_pretrained = _local_first(kind.from_pretrained, local)


def _local_first(load: Any, local: Any) -> Any:
    def from_pretrained(path: Any, *args: Any, **kwargs: Any) -> Any:
        return local() if str(path).startswith("hf-internal-testing/") else load(path, *args, **kwargs)

    return from_pretrained


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return CLIPTokenizer(
        vocab={token: n for n, token in enumerate(tokens)}, merges=[], model_max_length=LENGTH
    )


def _t5_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = {token: n for n, token in enumerate(["<pad>", "</s>", "<unk>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=LENGTH,
    )


def _t5_config() -> Any:
    from transformers import T5Config

    return T5Config(vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
