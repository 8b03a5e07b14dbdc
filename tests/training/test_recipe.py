import pytest
import yaml

from pyvlm.training.recipe import PARTS, load_recipe, merge, shipped_recipes


@pytest.fixture
def write_recipe(tmp_path, small_recipe):
    """Writes a recipe with changes to a file, without what is filled in."""

    def write(**changes):
        content = merge(small_recipe().model_dump(mode="json"), changes)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, None if name == "demo" else "tiny") for name in shipped_recipes()],
)
def test_recipes_of_bundled_data_fit_their_words(name, variant):
    recipe = load_recipe(name, variant)
    assert recipe.total_steps > 0
    assert recipe.model.language.vocab_size == recipe.processor().vocab_size
    assert recipe.model.image_token_id == recipe.processor().image_token_id


def test_quick_variant_changes_what_it_names_and_nothing_else():
    full, quick = load_recipe("demo"), load_recipe("demo", "quick")
    assert quick.total_steps < full.total_steps
    assert quick.model == full.model
    assert list(quick.stages) == list(full.stages)


def test_overrides_and_defaults(write_recipe):
    recipe = load_recipe(write_recipe(), seed=17)
    assert recipe.seed == 17
    assert recipe.stages["one"].train == list(PARTS)
    assert recipe.stages["one"].rate_of("vision") == 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sed": 1}, "sed is unknown: did you mean 'seed'"),
        ({"stages": {"one": {"batchsize": 1}}}, "stages.one.batchsize is unknown: did you mean 'batch_size'"),
        (
            {"stages": {"one": {"data": {"image": 1}}}},
            "stages.one.data.image is unknown: did you mean 'images'",
        ),
        (
            {"model": {"language": {"moe": {"expert": 1}}}},
            "moe.expert is unknown: did you mean 'num_experts'",
        ),
        (
            {"model": {"vision_towers": [{"name": "v", "type": "conv", "channels": [4], "block": [1]}]}},
            "block is unknown: did you mean 'blocks'",
        ),
        ({"zzzz": 1}, "zzzz is unknown: expected one of .*stages"),
        ({"stages": {"one": {"steps": 0}}}, "stages.one.steps: .*greater than 0"),
        ({"stages": {"one": {"epochs": 1.0}}}, "stages.one: give steps or epochs, got 5 and 1.0"),
        ({"stages": {"one": {"steps": None}}}, "stages.one: give steps or epochs, got None and None"),
        ({"stages": {"one": {"warmup": 1.5}}}, "stages.one.warmup"),
        ({"trackers": ["paper"]}, "trackers.0: .*'tensorboard'"),
        ({"stages": {"one": {"lr": {"vision": 1.0}}}}, "give a rate for each part"),
        ({"stages": {"one": {"accumulation": 3}}}, "no multiple of accumulation"),
        (
            {"stages": {"one": {"label_smoothing": 1.5}}},
            "stages.one.label_smoothing: .*less than or equal to 1",
        ),
        ({"stages": {"one": {"z_loss": -1.0}}}, "stages.one.z_loss: .*greater than or equal to 0"),
        ({"model": {"language": {"vocab_size": 7}}}, "vocab_size is 7"),
    ],
)
def test_defects_are_named_with_their_place(write_recipe, changes, message):
    path = write_recipe(**changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "no recipe"),
        ("", "no recipe"),
        ("name: x", "model: Field required"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


def test_missing_file_and_missing_variant(write_recipe):
    with pytest.raises(ValueError, match=r"cannot be read .*shipped recipes: .*demo"):
        load_recipe("no/such/recipe.yaml")
    with pytest.raises(ValueError, match="no variant 'quick'; it has none"):
        load_recipe(write_recipe(), "quick")
