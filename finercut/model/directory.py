"""A model directory: config, tokenizer, weights and the trust in its code, each read once.

transformers' Auto classes take seconds to import, so each waits until a part is read that needs it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open

from finercut.model import remote_code, tensors
from finercut.model.configs import VOCABULARY_FILES, context_of, read_object
from finercut.model.families import Layout, auto_class, layout_of
from finercut.model.tensors import StoredTensor
from finercut.sublayers import Sublayer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# What transformers raises on files that are not as it expects.
_UNEXPECTED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    RuntimeError,
    OSError,
    StrictDataclassError,
)

# Names of buffers that models of any type have stored once.
_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$")

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""torch's names of dtypes by those in safetensors files."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' load reports and progress bars: the caller reports what matters."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Turns any error that a broken file causes into one line that starts with `what`.

    Raises:
        ValueError
    """
    try:
        with quiet():
            yield
    except SystemExit as error:  # of a model's own code
        raise ValueError(f"{what}: its code ends the program ({error.code})") from error
    except Exception as error:
        # The tokenizers library raises nothing more exact than Exception.
        if not isinstance(error, _UNEXPECTED) and type(error) is not Exception:
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{what}: {type(error).__name__} {reason}".strip()) from error


class ModelDirectory:
    """A model in Hugging Face layout. Every part is read when it is first used, and once.

    The files must not change while the value is in use; whoever writes a directory opens it anew.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @classmethod
    def of(cls, model: ModelDirectory | Path | str) -> ModelDirectory:
        """`model` itself, or the directory at that path."""
        return model if isinstance(model, ModelDirectory) else cls(model)

    def __str__(self) -> str:
        return str(self.path)

    def written_by(self, stage: str) -> Self:
        """Itself.

        Raises:
            FileNotFoundError: there is no model; the message names the stage that writes it.
        """
        if not (self.path / "config.json").is_file():
            raise FileNotFoundError(f"no model in {self.path}: run `finercut {stage}` first")
        return self

    @cached_property
    def settings(self) -> dict[str, Any]:
        """config.json as it is stored.

        Raises:
            ValueError: it is not a JSON object.
        """
        return read_object(self.path / "config.json")

    @property
    def is_pruned(self) -> bool:
        return str(self.settings.get("model_type")).startswith("finercut_")

    @cached_property
    def trusted(self) -> bool:
        """Whether its own Python code may run, see `remote_code.trusts_code`.

        Raises:
            ValueError: the code has changed since it was trusted.
        """
        return remote_code.trusts_code(self.path)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """transformers' config; untrusted code of the model's own does not run.

        Raises:
            ValueError: it cannot be read, or needs such code.
        """
        from transformers import AutoConfig

        _ = self.settings
        trusted = self.trusted
        with one_line_errors(f"{self.path / 'config.json'} is not a model's config"):
            return AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=trusted)

    @property
    def language(self) -> PreTrainedConfig:
        """The config of the language model inside: `config` itself for a plain decoder."""
        return self.config.get_text_config()

    @property
    def context(self) -> int:
        """Tokens that the model reads at most; `configs.NO_LIMIT` if it has no limit."""
        return context_of(self.language)

    @property
    def has_tokenizer(self) -> bool:
        """Whether there are files of one."""
        return any((self.path / name).is_file() for name in VOCABULARY_FILES)

    @contextmanager
    def one_line_of_its_tokenizer(self) -> Iterator[None]:
        """Turns any error of reading the tokenizer into one line.

        Raises:
            ValueError
        """
        trusted = self.trusted
        try:
            with one_line_errors(f"the tokenizer in {self.path} cannot be read"):
                yield
        except ValueError as error:
            file = self.path / "tokenizer_config.json"
            if trusted or not (file.is_file() and (own := read_object(file).get("auto_map"))):
                raise
            raise ValueError(
                f"the tokenizer is Python code of the model's own ({own}), which is not run for a type of model that "
                "transformers knows: load it where you trust that code, and save it as tokenizer.json"
            ) from error

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """
        Raises:
            ValueError: it cannot be read, or makes no tokens of a word.
        """
        from transformers import AutoTokenizer

        with self.one_line_of_its_tokenizer():
            tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=self.trusted)
            n_tokens = len(tokenizer("finercut").input_ids)
        if not n_tokens:
            raise ValueError(
                f"the tokenizer in {self.path} makes no tokens of a word: its files do not belong together"
            )
        return tokenizer

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every stored tensor by name, from the files' headers; see `tensors.safetensors_shapes` for what it raises."""
        return tensors.safetensors_shapes(self.path)

    @cached_property
    def weights(self) -> dict[str, StoredTensor]:
        """Those of `tensors` that are the model's: not the masks and frequencies that older files have beside them.
        transformers passes these over.

        Raises:
            ValueError: nothing is stored.
        """
        if not self.tensors:
            raise ValueError(f"the weights in {self.path} do not fit the config: its files have no tensors")
        of = auto_class(self.config)._model_mapping.get(type(self.config), None)
        # Of layers behind the blocks that predict tokens further ahead; transformers' patterns have published depths.
        n_ahead = getattr(self.language, "num_nextn_predict_layers", None) or 0
        ahead = [rf"\.layers\.{self.language.num_hidden_layers + i}\." for i in range(n_ahead)]
        passed_over = re.compile(
            "|".join([*_BUFFERS, *ahead, *(getattr(of, "_keys_to_ignore_on_load_unexpected", None) or ())])
        )
        if not any(map(passed_over.search, self.tensors)):
            return self.tensors
        # The patterns are for what a model has no place for: they fit some names that it has one for.
        import torch

        with torch.device("meta"):
            empty = auto_class(self.config).from_config(self.config, trust_remote_code=self.trusted)
        places, prefix = empty.state_dict().keys(), f"{empty.base_model_prefix}."
        return {
            name: stored
            for name, stored in self.tensors.items()
            if not passed_over.search(name) or name in places or prefix + name in places
        }

    @cached_property
    def dtype(self) -> str:
        """What most bytes of the weights are stored as: bfloat16, float16, float32; else as safetensors spells it.

        Raises:
            ValueError: nothing is stored.
        """
        n_bytes = Counter[str]()
        for stored in self.weights.values():
            n_bytes[stored.dtype] += stored.nbytes
        found = n_bytes.most_common(1)[0][0]
        return DTYPES.get(found, found)

    def tensor(self, name: str) -> Tensor:
        """A stored tensor.

        Raises:
            KeyError: none has that name.
        """
        for file in tensors.safetensors_files(self.path):
            with safe_open(file, framework="pt") as stored:
                if name in stored.keys():  # noqa: SIM118
                    return stored.get_tensor(name)
        raise KeyError(name)

    @cached_property
    def weights_sha256(self) -> str:
        return tensors.weights_sha256(self.path)

    @property
    def weights_bytes(self) -> int:
        return tensors.weights_bytes(self.path)

    @property
    def n_elements(self) -> int:
        """Numbers of the weights; a tied one counts once, and an integer that packs eight of 4 bits as eight."""
        return sum(t.n_elements * (8 if name.endswith("_packed") else 1) for name, t in self.weights.items())

    @property
    def layout(self) -> Layout:
        """Where a whole model keeps its sublayers.

        Raises:
            ValueError: the model cannot be pruned, and why; or its family is not declared.
        """
        return layout_of(self.config)

    @property
    def removed(self) -> list[Sublayer]:
        """The sublayers that a pruned model lacks, by depth."""
        from finercut.model import modeling_finercut

        return [Sublayer(*removed) for removed in modeling_finercut.removed_sublayers(self.config)]
