"""Text that the model writes itself: sampling against hand calculations and transformers, filters, and the stage."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TEXT, make_tokenizer, random_llama
from hub_server import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from finercut.model.directory import ModelDirectory
from finercut.sources.generation import Draft, beginnings, draw, keep, model_texts, sample
from finercut.sources.settings import ModelText
from finercut.tokens import load_tokens
from pipelines import calibrate, paths
from pipelines.params import Params, load

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"


def settings(**changes) -> ModelText:
    return ModelText.model_validate({"kind": "model", "max_tokens": 24, "device": "cpu"} | changes)


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture
def own_tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


# Sampling


def test_a_draw_falls_on_the_likeliest_tokens_that_have_top_p_together():
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()

    def drawn(chance: float, top_p: float) -> int:
        return int(draw(logits, torch.tensor([chance]), top_p))

    # By likelihood 1, 2, 0. Of 1 and 2, which have 0.8 together, 1 has five eighths.
    assert [drawn(chance, 0.6) for chance in (0.0, 0.62, 0.63, 0.999999)] == [1, 1, 2, 2]
    assert [drawn(chance, 1.0) for chance in (0.49, 0.51, 0.79, 0.81, 0.999999)] == [1, 2, 2, 0, 0]
    assert [drawn(chance, 0.5) for chance in (0.0, 0.999999)] == [1, 1]
    assert drawn(0.999999, 1e-9) == 1  # the likeliest is never left out


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.randn(5, generator=torch.Generator().manual_seed(0))
    n = 4000
    drawn = draw(logits.expand(n, 5), (torch.arange(n) + 0.5) / n, 1.0)[:, 0]
    torch.testing.assert_close(drawn.bincount(minlength=5) / n, logits.softmax(-1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.95, 0.999, 1.0])
def test_a_draw_does_not_depend_on_which_tokens_are_sorted(top_p):
    # Some rows have all of it in a few tokens, others in many; and there are ties.
    spread = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0, 16.0])[:, None]
    logits = spread * torch.randn(6, 300, generator=torch.Generator().manual_seed(2)).round(decimals=1)
    chances = torch.rand(6, generator=torch.Generator().manual_seed(3))
    expected = []
    for row, chance in zip(logits, chances, strict=True):
        p, order = row.softmax(-1).sort(descending=True, stable=True)
        nucleus = [0.0, *p.cumsum(-1).tolist()]
        n = next(i for i, total in enumerate(nucleus) if total >= top_p or i == len(p))
        place = next(i for i in range(n) if nucleus[i + 1] > chance * nucleus[n])
        expected.append(int(order[place]))
    for n_likely in (1, 16, 300):
        assert draw(logits, chances, top_p, n_likely)[:, 0].tolist() == expected


def test_what_is_written_has_the_likelihood_the_whole_forward_gives_it(model):
    rows = torch.tensor([[0], [0], [7]])
    chances = torch.rand(20, 3, generator=torch.Generator().manual_seed(3))
    ids, log_p = sample(model, rows.tolist(), chances, torch.tensor([-1]), 0.8, 0.9)
    assert ids.shape == log_p.shape == (3, 20)
    with torch.no_grad():
        logits = model(torch.cat([rows, ids], -1)).logits[:, :-1].float()
    expected = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(log_p, expected, atol=1e-4, rtol=0)


def test_without_warmth_it_writes_what_transformers_writes(model):
    rows = torch.tensor([[5, 9, 30]])
    ids, _ = sample(model, rows.tolist(), torch.full((16, 1), 0.5), torch.tensor([-1]), 1e-4, 1.0)
    greedy = model.generate(rows, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    assert ids.tolist() == greedy[:, 3:].tolist()


def test_padding_changes_nothing_that_is_written(model):
    chances = torch.rand(12, 2, generator=torch.Generator().manual_seed(4))
    starts = [[5, 9, 30], [7, 8, 11, 12, 13]]
    ids, log_p = sample(model, starts, chances, torch.tensor([-1]), 1.0, 0.9)
    for row, start in enumerate(starts):
        alone = sample(model, [start], chances[:, row : row + 1], torch.tensor([-1]), 1.0, 0.9)
        assert ids[row].tolist() == alone[0][0].tolist()
        torch.testing.assert_close(log_p[row], alone[1][0], atol=1e-4, rtol=0)


def test_it_ends_when_every_row_has_met_a_stop(model):
    rows = torch.tensor([[0], [0]])
    chances = torch.rand(30, 2, generator=torch.Generator().manual_seed(1))
    whole, _ = sample(model, rows.tolist(), chances, torch.tensor([-1]), 1.0, 1.0)
    stops = torch.tensor([int(whole[0, 4]), int(whole[1, 9])])
    ids, _ = sample(model, rows.tolist(), chances, stops, 1.0, 1.0)
    met = torch.isin(whole, stops)
    assert ids.shape[1] == max(int(row.int().argmax()) for row in met) + 1
    assert ids.tolist() == whole[:, : ids.shape[1]].tolist()


# Filters


def draft(*written: int, perplexity: float = 10.0) -> Draft:
    return Draft([0], list(written), [], perplexity)


def test_repetition_is_the_share_of_runs_of_four_that_occurred_before():
    assert draft(1, 2, 3, 4, 5, 6, 7).repetition == 0
    assert draft(1, 2, 3, 4, 1, 2, 3, 4).repetition == pytest.approx(1 / 5)  # of five runs, 1 2 3 4 twice
    assert draft(*[1] * 13).repetition == pytest.approx(9 / 10)
    assert draft(1, 1, 1).repetition == 0  # no run at all


def test_the_repetitive_go_first_and_then_the_share_that_is_least_likely():
    drafts = [
        draft(*range(20), perplexity=30),
        draft(*[7] * 20, perplexity=1),
        draft(*range(10), perplexity=50),
        draft(perplexity=math.inf),
        draft(*range(5), perplexity=20),
        draft(*range(6), perplexity=40),
    ]
    kept = keep(drafts, settings(max_repetition=0.3, drop_perplexity=0.5))
    assert kept == [drafts[0], drafts[4]]  # two of the four sound ones, in their order
    assert keep(drafts, settings(max_repetition=0.3, drop_perplexity=0)) == [drafts[i] for i in (0, 2, 4, 5)]
    assert keep(drafts, settings(max_repetition=1, drop_perplexity=0)) == [drafts[i] for i in (0, 1, 2, 4, 5)]


# Beginnings


def test_a_document_starts_from_the_end_of_another_or_bos_or_eos(own_tokenizer):
    assert beginnings(settings(), own_tokenizer) == [[0]]
    own_tokenizer.bos_token = None
    assert beginnings(settings(), own_tokenizer) == [[1]]
    assert beginnings(settings(start="<pad>"), own_tokenizer) == [[2]]
    own_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has neither BOS nor EOS to start a text from: name a token as the start"):
        beginnings(settings(), own_tokenizer)
    with pytest.raises(ValueError, match=r"start: '<\|endoftext\|>', which is no token of the model's tokenizer"):
        beginnings(settings(start="<|endoftext|>"), own_tokenizer)
    own_tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<|endoftext|>"]})
    assert beginnings(settings(), own_tokenizer) == [own_tokenizer.convert_tokens_to_ids(["<|endoftext|>"])]


def test_prompts_are_asked_in_the_chat_template(own_tokenizer):
    asked = settings(prompts=["Why?", "Who else?"])
    with pytest.raises(ValueError, match="whose tokenizer has no chat template: take them out"):
        beginnings(asked, own_tokenizer)
    own_tokenizer.chat_template = TEMPLATE
    found = beginnings(asked, own_tokenizer)
    assert [own_tokenizer.decode(ids) for ids in found] == ["<s>Why?</s><s>", "<s>Who else?</s><s>"]
    own_tokenizer.chat_template = "{{ raise_exception('no user here') }}"
    with pytest.raises(ValueError, match="does not take the prompts in calibrate: no user here"):
        beginnings(asked, own_tokenizer)


# Documents


def test_a_seed_gives_the_same_documents_again_and_another_seed_others(tiny_model):
    first, again, other = (model_texts(settings(seed=seed), ModelDirectory(tiny_model), 100, 16) for seed in (4, 4, 5))
    assert first == again
    assert first.revision != other.revision
    assert not set(first.documents) & set(other.documents)


def test_more_documents_begin_with_those_that_fewer_have(tiny_model):
    options = {"drop_perplexity": 0, "max_repetition": 1, "batch_size": 2}
    few, many = (model_texts(settings(**options), ModelDirectory(tiny_model), needed, 16) for needed in (60, 300))
    assert len(many.documents) > len(few.documents) + 4
    assert many.documents[: len(few.documents)] == few.documents


def test_an_answer_keeps_its_question(tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    asked = settings(prompts=["Why?", "Who else is there?"])
    found = model_texts(asked, ModelDirectory(directory), 100, 16).documents
    assert all(text.startswith(("<s>Why?</s><s>", "<s>Who else is there?</s><s>")) for text in found)
    assert len({text.partition("</s>")[0] for text in found}) == 2


def test_a_template_that_writes_tokens_without_embeddings_is_refused(tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = make_tokenizer()
    n_embeddings = ModelDirectory(directory).language.vocab_size
    tokenizer.add_tokens([f"<|{n}|>" for n in range(n_embeddings - len(tokenizer) + 1)], special_tokens=True)
    tokenizer.chat_template = f"{{{{ messages[0].content }}}}{tokenizer.convert_ids_to_tokens(n_embeddings)}"
    tokenizer.save_pretrained(directory)
    with pytest.raises(
        ValueError, match=rf"writes token {n_embeddings} \('<.*'\), for which the model has no embedding"
    ):
        model_texts(settings(prompts=["Why?"]), ModelDirectory(directory), 100, 16)


@pytest.fixture
def flat_model(tiny_model, tmp_path) -> ModelDirectory:
    """A model that finds all tokens as likely, so that of a small `top_p` the first one is always drawn: BOS."""
    directory = shutil.copytree(tiny_model, tmp_path / "flat")
    flat = random_llama()
    torch.nn.init.zeros_(flat.model.norm.weight)
    flat.save_pretrained(directory)
    return ModelDirectory(directory)


def test_where_nothing_is_left_it_says_what_was_wrong(flat_model):
    with pytest.raises(
        ValueError, match=r"^of 8 documents .*, 8 are empty and 0 repeat themselves; 0 with 0 tokens are"
    ):
        model_texts(settings(top_p=1e-6), flat_model, 100, 16)
    with pytest.raises(ValueError, match=r", 0 are empty and 8 repeat themselves; .* or raise max_repetition in cal"):
        model_texts(settings(top_p=1e-6, start="<pad>"), flat_model, 100, 16)


def ended_by(model: ModelDirectory, n_tokens: int) -> ModelDirectory:
    """The model, whose documents as many of its 400 tokens end."""
    file = model.path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": list(range(3, 3 + n_tokens))}))
    return ModelDirectory(model.path)


def test_it_gives_up_where_documents_are_far_too_short(flat_model):
    with pytest.raises(ValueError, match=r"^of 8 documents that the model wrote, \d are empty .*, 153 are needed: try"):
        model_texts(settings(batch_size=5), ended_by(flat_model, 200), 100, 16)


def test_documents_much_shorter_than_a_window_are_written_until_they_are_enough(flat_model):
    texts = model_texts(settings(max_tokens=128), ended_by(flat_model, 20), 600, 128)
    # Of full length, 7 would have been enough; one in twenty tokens ends them.
    assert 28 < len(texts.documents) < 200


def test_a_document_must_fit_the_context(tiny_model):
    with pytest.raises(ValueError, match="a prompt and 256 tokens .* are 257 tokens, its context has 256: lower max_"):
        model_texts(settings(max_tokens=256), ModelDirectory(tiny_model), 10, 16)


# The stage


def params(**changes) -> Params:
    values = load(ROOT / "params.yaml").model_dump(by_alias=True)
    values["calibrate"] |= {"source": None, "unseen": None, "n_samples": 4, "n_tokens": 16, "n_held_out_samples": 2}
    values["calibrate"]["n_healing_samples"] = 0
    return Params.model_validate(values | {"calibrate": values["calibrate"] | changes})


OWN = {"kind": "model", "max_tokens": 32, "device": "cpu"}
PROSE = {"kind": "files", "paths": ["text.txt"]}


@pytest.fixture
def project(tiny_model, tmp_path, monkeypatch) -> Path:
    shutil.copytree(tiny_model, tmp_path / paths.MODEL)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n\n".join(TEXT * 6))
    return tmp_path


def test_the_stage_cuts_windows_from_what_the_model_writes(project, caplog):
    caplog.set_level(logging.INFO, "finercut")
    report = calibrate.run(params(sources=[PROSE, OWN]))
    prose, own = report.sources
    assert (own.name, own.kind, own.n_samples, own.n_held_out_samples) == ("the model's own text", "model", 2, 1)
    assert len(own.revision) == 64
    assert prose.n_samples == 2
    assert "the model wrote" in caplog.text
    before = (paths.CALIBRATION / "tokens.safetensors").read_bytes()
    assert calibrate.run(params(sources=[PROSE, OWN])) == report
    assert (paths.CALIBRATION / "tokens.safetensors").read_bytes() == before
    assert load_tokens(paths.CALIBRATION).sources == ("text.txt", "the model's own text")
    assert not calibrate.is_stale(params(sources=[PROSE, OWN]))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([PROSE, OWN | {"start": "<|im_start|>"}], "is no token of the model's tokenizer"),
        ([OWN, PROSE | {"share": 1000}], "leaves no window for the model's own text"),
        ([OWN, {"kind": "files", "paths": ["no.txt"]}], "no file no.txt"),
        ([OWN, {"kind": "files", "paths": ["short.txt"]}], "short.txt has"),
    ],
)
def test_nothing_is_written_before_everything_else_is_in_order(project, caplog, sources, message):
    caplog.set_level(logging.INFO, "finercut")
    Path("short.txt").write_text("Too short.")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        calibrate.run(params(sources=sources))
    assert "the model wrote" not in caplog.text
    assert not paths.CALIBRATION.exists()
    assert not paths.report("calibrate").exists()
