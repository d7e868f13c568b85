import pytest

from finercut.sublayers import FrontExclusion, Sublayer, candidates, open_candidates, parse, protected


def test_names_round_trip_and_order_is_depth():
    names = ["0.attention", "0.mlp", "2.attention", "10.mlp"]
    shuffled = [parse(name) for name in reversed(names)]
    assert [str(c) for c in sorted(shuffled)] == names
    assert parse("3.block").sublayers == (Sublayer(3, "attention"), Sublayer(3, "mlp"))
    assert str(parse("3.block")) == "3.block"


@pytest.mark.parametrize("name", ["12", "attention.12", "12.attn", "-1.mlp", "1.mlp ", "1.mlp.weight", ""])
def test_what_is_no_sublayer_is_refused_with_an_example(name):
    with pytest.raises(ValueError, match=r"12\.attention"):
        parse(name)


def test_candidates_of_each_kind():
    assert [str(c) for c in candidates(2, "both")] == ["0.attention", "0.mlp", "1.attention", "1.mlp"]
    assert [str(c) for c in candidates(2, "mlp")] == ["0.mlp", "1.mlp"]
    assert [str(c) for c in candidates(2, "blocks")] == ["0.block", "1.block"]


def test_protecting_a_block_protects_both_of_its_sublayers():
    assert protected(["0.block", "1.mlp"], 2) == {Sublayer(0, "attention"), Sublayer(0, "mlp"), Sublayer(1, "mlp")}
    with pytest.raises(ValueError, match="blocks 0 to 1"):
        protected(["2.mlp"], 2)


# Facts of the authors' code for Llama3-8B (64 sublayers) and 70B (160) at x = 0.4.
@pytest.mark.parametrize(("n", "blocks", "until"), [(64, 13, 26), (160, 33, 65)])
def test_front_exclusion_is_the_authors(n, blocks, until):
    rule = FrontExclusion(n, 0.4)
    assert (rule.n_blocks, rule.until_removals) == (blocks, until)
    first, behind = parse(f"{blocks - 1}.mlp"), parse(f"{blocks}.attention")
    assert rule.covers(first, until - 1)
    assert not rule.covers(first, until)
    assert not rule.covers(behind, 0)


def test_evaluations_to_a_quarter_of_llama3_8b_are_the_papers_488():
    pool = candidates(32)
    rule = FrontExclusion(len(pool), 0.4)
    removed, evaluations = [], 0
    for _ in range(16):
        choice = open_candidates(pool, removed, exclusion=rule)
        evaluations += len(choice)
        removed.append(choice[-1])
    assert evaluations == 488
