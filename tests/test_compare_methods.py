"""What the methods of a grid are called, what they are configured as, and which learning rates they try."""

import pytest

from chanscale.baselines import BASELINES, LEARNING_RATES
from chanscale.comparison.methods import COMMON, configure, find_reference, learning_rates, parse_methods
from chanscale.config import FitConfig
from chanscale.errors import ConfigError

CONFIG = FitConfig(precision="32-true", group_pattern="^(\\d+)_")


def test_methods_are_known_ones_each_once():
    known = ("head", "full")
    got = parse_methods(["full", "chanscale", "chanscale@0.990", "chanscale@0.99", "full"], known)
    assert got == ("full", "chanscale", "chanscale@0.99")
    for wrong in ("nonsense", "head@0.9", "head+round_to=1", "chanscale-2", "random", "random@0.9"):
        with pytest.raises(ConfigError, match="--methods must be among head, full, chanscale, METHOD@"):
            parse_methods([wrong], known)


def test_those_that_cut_take_a_budget_and_nothing_else():
    assert parse_methods(["random", "random@0.990", "random@.99"], BASELINES) == ("random", "random@0.99")
    assert configure("random@0.99", CONFIG, seed=3) == CONFIG.model_copy(update={"budget": 0.99, "seed": 3})
    assert learning_rates("taylor@0.9", CONFIG) == LEARNING_RATES["taylor"]
    with pytest.raises(ConfigError, match=r"only chanscale takes options; write taylor or taylor@BUDGET$"):
        parse_methods(["taylor@0.9+round_to=1"], BASELINES)
    with pytest.raises(ConfigError, match=r"^random@2: budget: Input should be less than 1"):
        parse_methods(["random@2"], BASELINES)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["chanscale+weigh_by=uniform+penalty=gradient"], "chanscale+penalty=gradient+weigh_by=uniform"),
        (["chanscale+round_to=01+budget=.990", "chanscale@0.99+round_to=1"], "chanscale@0.99+round_to=1"),
        (["chanscale+early_removal=no", "chanscale+early_removal=False"], "chanscale+early_removal=false"),
        (["chanscale+concavity=0.0", "chanscale+concavity=0"], "chanscale+concavity=0"),
        (["chanscale+refine_lr=1e-5", "chanscale+refine_lr=0.00001"], "chanscale+refine_lr=1e-05"),
        (["chanscale+head_decay=1e20"], "chanscale+head_decay=1e20"),
        (["chanscale+budget=0.9512345678"], "chanscale@0.9512345678"),
        (["chanscale+threshold=null"], "chanscale+threshold=null"),
    ],
)
def test_options_of_ours_have_one_name(given, wanted):
    assert parse_methods(given, ()) == (wanted,)
    assert parse_methods([wanted], ()) == (wanted,)
    assert configure(wanted, CONFIG, seed=0) == configure(given[0], CONFIG, seed=0)


def test_what_all_methods_have_is_left_out_of_their_names():
    common = CONFIG.model_copy(update={"budget": 0.9, "round_to": 8})
    given = [
        "chanscale@0.9",
        "chanscale",
        "random@0.90",
        "random",
        "chanscale@0.95+round_to=8",
        "chanscale+budget=.9",
    ]
    assert parse_methods(given, BASELINES, common) == ("chanscale", "random", "chanscale@0.95")
    for method in given:
        (name,) = parse_methods([method], BASELINES, common)
        assert configure(name, common, seed=1) == configure(method, common, seed=1)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("chanscale@2", "budget: Input should be less than 1. Got budget=2."),
        ("chanscale@much", "budget: Input should be a valid number"),
        ("chanscale@", "budget: Input should be a valid number"),
        ("chanscale+penalty=weak", "penalty: Input should be 'proximal' or 'gradient'. Got penalty='weak'."),
        ("chanscale+round_to=[1]", "round_to: Input should be a valid integer"),
        ("chanscale+round_to=[1", "round_to must be a YAML value"),
        ("chanscale+round_to=2026-99-99", "round_to must be a YAML value"),
        ("chanscale+best=1", "there is no option 'best'; chanscale fit --help lists them"),
        ("chanscale+round-to=1", "there is no option 'round-to'"),
        ("chanscale+round_to", "'round_to' must be OPTION=VALUE"),
        ("chanscale+", "'' must be OPTION=VALUE"),
        ("chanscale+round_to=1+round_to=2", "round_to is given twice; leave one out"),
        ("chanscale@0.9+budget=0.9", "budget is given twice"),
        ("chanscale+penalty=../gradient", "penalty becomes part of a file name, and must be without / and"),
        ("chanscale+penalty=a\\b", "penalty becomes part of a file name"),
        ("chanscale+coverage=0.9", "coverage says how probabilities are read, and changes no cell"),
    ],
)
def test_options_of_ours_that_cannot_be_name_the_method(method, words):
    with pytest.raises(ConfigError) as caught:
        parse_methods([method], ())
    assert str(caught.value).startswith(f"{method}: {words}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", sorted(COMMON))
def test_what_all_methods_have_in_common_is_no_option_of_ours(option):
    with pytest.raises(
        ConfigError, match=rf"chanscale\+{option}=1: {option} must be the same for all methods"
    ):
        parse_methods([f"chanscale+{option}=1"], ())
    assert option in FitConfig.model_fields


def test_a_method_that_no_file_could_be_named_after_is_refused():
    options = "+".join(f"{name}=0.123456789012345" for name in ("anchor", "concavity", "head_lr", "pressure"))
    assert len(parse_methods([f"chanscale+{options}"], ())[0]) < 150
    with pytest.raises(ConfigError, match="is too long; give it fewer options"):
        parse_methods([f"chanscale+{options}+head_decay=0.123456789012345+refine_lr=0.123456789012345"], ())


def test_ours_has_its_options_in_its_name_and_every_cell_its_seed():
    assert configure("chanscale@0.99+early_removal=false", CONFIG, seed=3) == CONFIG.model_copy(
        update={"budget": 0.99, "early_removal": False, "seed": 3}
    )
    assert configure("head", CONFIG, seed=3, lr=1e-5) == CONFIG.model_copy(update={"seed": 3})
    assert configure("chanscale+refine_lr=1", CONFIG, seed=0, lr=0.3).refine_lr == 0.3


def test_ours_tries_what_baselines_that_train_scales_try():
    assert learning_rates("chanscale", FitConfig()) == LEARNING_RATES["scale"]
    assert learning_rates("chanscale@0.9", CONFIG.model_copy(update={"refine_lr": 0.1})) == (0.03, 0.1, 0.3)
    assert learning_rates("full", FitConfig()) == LEARNING_RATES["full"]
    assert learning_rates("head", FitConfig()) == ()


def test_others_are_compared_with_ours_with_the_common_options():
    assert find_reference(["head", "chanscale@0.99", "chanscale"]) == "chanscale"
    assert find_reference(["head", "chanscale+round_to=1", "chanscale@0.99"]) == "chanscale+round_to=1"
    assert find_reference(["head"]) is None
