"""A pruned model's tokenizer is the whole model's, whatever goes by the model's type or the repository's name."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
from conftest import random_llama
from tokenizers import Regex, pre_tokenizers, processors
from transformers import AutoTokenizer

from finercut.checkpoint.writing import write_pruned
from finercut.model import tokenizer_files
from finercut.model.directory import ModelDirectory
from finercut.sublayers import Sublayer

TEXT = "The river rises in 2023."
REMOVED = [Sublayer(2, "attention"), Sublayer(3, "mlp")]


@pytest.fixture(scope="module")
def digits():
    """A tokenizer with tokens of several digits that splits every digit off, as OLMo-2's and Granite's files say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conftest, "TEXT", [*conftest.TEXT, "2023 2024 2025 1999 " * 50])
        made = conftest.make_tokenizer()
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    made.chat_template = {
        "default": "D{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "tool_use": "T{{ messages[0].content }}",
    }
    return made


def published(directory: Path, tokenizer, model_type: str, hub_class: str, **settings) -> Path:
    """A model whose files name a tokenizer class that transformers may correct. Its weights are a Llama's."""
    random_llama().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    edit(directory / "tokenizer_config.json", tokenizer_class=hub_class, **settings)
    edit(directory / "config.json", model_type=model_type)
    return directory


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def as_pruned(whole: Path, directory: Path) -> Path:
    """The files of a pruned model's tokenizer, beside a config of its type, without its weights."""
    directory.mkdir()
    model = ModelDirectory(whole)
    pruned = {"model_type": f"finercut_{model.settings['model_type']}"}
    (directory / "config.json").write_text(json.dumps(model.settings | pruned))
    tokenizer_files.write(model.tokenizer, directory)
    return directory


CORRECTED = [
    ("qwen2", "LlamaTokenizerFast"),  # DeepSeek-R1-Distill-Qwen
    ("phi3", "LlamaTokenizer"),
    ("mistral", "LlamaTokenizerFast"),  # tekken models
    ("mixtral", "LlamaTokenizerFast"),
    ("olmo2", "GPT2Tokenizer"),
    ("granite", "GPT2Tokenizer"),
    ("deepseek_v3", "LlamaTokenizerFast"),
    ("llama", "LlamaTokenizer"),
]


@pytest.mark.parametrize(("model_type", "hub_class"), CORRECTED)
def test_a_pruned_tokenizer_is_what_transformers_makes_of_the_whole_ones_files(digits, tmp_path, model_type, hub_class):
    whole = published(tmp_path / "whole", digits, model_type, hub_class)
    expected = AutoTokenizer.from_pretrained(whole)
    found = AutoTokenizer.from_pretrained(as_pruned(whole, tmp_path / "pruned"))
    for add in (True, False):
        assert found(TEXT, add_special_tokens=add).input_ids == expected(TEXT, add_special_tokens=add).input_ids
    assert found.model_input_names == expected.model_input_names
    assert (found.padding_side, found.eos_token_id) == (expected.padding_side, expected.eos_token_id)
    chat = [{"role": "user", "content": "x"}]
    assert found.apply_chat_template(chat, chat_template="tool_use", tokenize=False) == "Tx"
    assert found.apply_chat_template(chat, tokenize=False) == "D<s>x"


def test_a_fetched_tokenizer_is_what_transformers_makes_of_it_under_the_repositorys_name(digits, tmp_path):
    # Under its own name transformers takes tokenizer.json as it is, elsewhere what Llama's class makes of it.
    name = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    fetched = published(tmp_path / "model", digits, "llama", "LlamaTokenizerFast")
    assert AutoTokenizer.from_pretrained(fetched).tokenize(TEXT) != digits.tokenize(TEXT)
    tokenizer_files.write(tokenizer_files.effective(ModelDirectory(fetched), name), fetched)
    assert AutoTokenizer.from_pretrained(fetched)(TEXT).input_ids == digits(TEXT).input_ids


@pytest.mark.slow  # imports transformers anew
def test_a_pruned_checkpoint_tokenizes_alike_in_a_process_that_never_saw_finercut(digits, tmp_path):
    whole = published(tmp_path / "whole", digits, "llama", "LlamaTokenizerFast")
    write_pruned(whole, REMOVED, tmp_path / "pruned", {"source": "tiny"}, "# card\n")
    code = (
        "import json, sys; from transformers import AutoTokenizer; "
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); assert 'finercut' not in sys.modules; "
        "print(json.dumps(t(sys.argv[2]).input_ids))"
    )
    said = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path / "pruned"), TEXT], capture_output=True, text=True, check=True
    )
    # transformers first asks whether to run the checkpoint's code, and takes no answer for no.
    assert json.loads(said.stdout[said.stdout.rindex("[0") :]) == AutoTokenizer.from_pretrained(whole)(TEXT).input_ids


def test_files_that_make_other_tokens_are_refused_in_one_line(digits, tokenizer, tmp_path):
    whole = published(tmp_path / "whole", digits, "llama", "PreTrainedTokenizerFast")
    other = published(tmp_path / "other", tokenizer, "llama", "PreTrainedTokenizerFast")
    with pytest.raises(ValueError, match=r"differs from the whole model's in .+: .+, and not .+") as refused:
        tokenizer_files.check(ModelDirectory(whole).tokenizer, other)
    assert "\n" not in str(refused.value)


def test_a_template_that_writes_the_time_is_no_difference(tokenizer, tmp_path):
    timed = copy.deepcopy(tokenizer)
    timed.chat_template = "{{ strftime_now('%H:%M:%S.%f') }} {{ messages[0].content }}"
    random_llama().save_pretrained(tmp_path)
    tokenizer_files.write(timed, tmp_path)
    rendered = tokenizer_files.sample(timed)["the chat template  with chat 0"]
    assert rendered == "%H:%M:%S.%f How high is it?"


def test_merges_are_not_dropped_at_random(tokenizer, tmp_path, caplog):
    dropping = copy.deepcopy(tokenizer)
    dropping.backend_tokenizer.model.dropout = 0.5
    random_llama().save_pretrained(tmp_path)
    tokenizer_files.write(dropping, tmp_path)
    assert "drops merges at random" in caplog.text
    text = "The river rises in the north. " * 20
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == tokenizer(text).input_ids
