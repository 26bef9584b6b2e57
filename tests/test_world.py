"""The little world: the same every time, without end or border, and said exactly by its captions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from hypothesis import given
from hypothesis import strategies as st

from streamt1_jax.errors import BadInputError
from streamt1_jax.mini import world
from streamt1_jax.mini.world import COLOURS, MOTIONS, MOVES, SHAPES, SIZES, SPEEDS, Scene, Thing, parse_caption

FIRST = "a red circle moves right and a small blue square spins on a striped background"


# Words only: the type checker draws random numbers of its own, which Hypothesis forbids while it draws.
words = st.tuples(*(st.sampled_from(list(of)) for of in (COLOURS, SHAPES, MOTIONS, SIZES, SPEEDS)))
scenes = st.tuples(st.lists(words, min_size=1, max_size=2), st.sampled_from(world.BACKGROUNDS))


def make_scene(drawn) -> Scene:
    rows, background = drawn
    things = (Thing(*row, speed=speed if row[2] in (*MOVES, "bounces") else "") for *row, speed in rows)
    return Scene(tuple(things), background)


@given(scenes)
def test_a_caption_says_the_scene_and_nothing_else(drawn):
    scene = make_scene(drawn)
    assert parse_caption(scene.caption()) == scene


@given(scenes, st.sampled_from([str.upper, str.capitalize, "  {}. ".format]))
def test_spelling_does_not_matter(drawn, spell):
    scene = make_scene(drawn)
    assert parse_caption(spell(scene.caption())) == scene


@given(st.text() | st.lists(st.sampled_from([*FIRST.split(), "and", "on", "a", "slowly"])).map(" ".join))
def test_other_text_is_refused_or_read_but_never_breaks(text):
    try:
        scene = parse_caption(text)
    except BadInputError:
        return
    assert parse_caption(scene.caption()) == scene


@pytest.mark.parametrize("caption", ["", "a red circle", "a corgi surfs a wave", f"{FIRST} and a red star spins"])
def test_what_the_grammar_does_not_know_is_refused(caption):
    with pytest.raises(BadInputError, match="expected"):
        parse_caption(caption)


def test_a_seed_makes_one_scene_and_one_opening():
    assert world.random_scene(3) == world.random_scene(3) != world.random_scene(4)
    assert np.array_equal(world.draw_openings(3), world.draw_openings(3))
    scene = parse_caption(FIRST)
    assert np.array_equal(worlds.film(scene, 7, 27), worlds.film.__wrapped__(scene, 7, 27))
    assert not np.array_equal(worlds.film(scene, 7, 27), worlds.film(scene, 8, 27))


def test_seeds_cover_the_grammar():
    found = [world.random_scene(seed) for seed in range(2000)]
    said = {word for scene in found for thing in scene.things for word in (thing.colour, thing.shape, thing.motion)}
    assert said == {*COLOURS, *SHAPES, *MOTIONS}
    assert {scene.background for scene in found} == set(world.BACKGROUNDS)
    assert all(len({thing.colour for thing in scene.things}) == len(scene.things) for scene in found)


def test_any_part_of_a_video_can_be_made_alone():
    scene = parse_caption(FIRST)
    assert np.array_equal(worlds.film(scene, 0, 81)[27:54], worlds.film(scene, 0, 27, 27))


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_video_has_no_end(motion):
    placed = world.place(Scene((Thing("red", "star", motion),)), world.draw_openings(0))
    frames = world.render(placed, jnp.array([10**6, 10**6 + 1]))
    assert jnp.isfinite(frames).all()
    assert float(jnp.abs(frames).max()) <= 1
    red = np.asarray(frames[0, ..., 0] - frames[0, ..., 1])
    assert (red > 1).sum() > 50, "the star is gone"


def test_what_leaves_on_one_side_comes_back_on_the_other():
    placed = world.place(parse_caption("a red circle moves right"), world.draw_openings(0))
    still = placed._replace(velocity=np.zeros((2, 2), np.float32))
    for start in ([0, 40], [127.5, 0], [64, 79]):
        here, there = (
            worlds.film_placed(still._replace(start=np.float32([start, start]) + shift), 1)
            for shift in (np.float32(0), np.float32([world.WIDTH, -world.HEIGHT]))
        )
        assert np.array_equal(here, there)
        middle = worlds.film_placed(still._replace(start=np.float32([[64, 40], [64, 40]])), 1)
        assert abs(int(here.sum()) - int(middle.sum())) < 0.01 * middle.sum(), "part of it is missing"


def test_moves_right_by_its_speed():
    placed = world.place(parse_caption("a red circle moves right quickly"), world.draw_openings(1))
    a, b = (world.pose(jax.tree.map(jnp.asarray, placed), jnp.int32(t)).centre[0] for t in (0, 10))
    assert np.allclose(np.mod(b - a, np.float32([world.WIDTH, world.HEIGHT])), [32, 0], atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_what_bounces_stays_inside(seed):
    placed = world.place(parse_caption("a large red circle bounces quickly"), world.draw_openings(seed))
    centres = jax.vmap(lambda t: world.pose(jax.tree.map(jnp.asarray, placed), t).centre[0])(jnp.arange(2000))
    low, high = 18.0, np.array([world.WIDTH, world.HEIGHT]) - 18.0
    assert (centres >= low - 1e-3).all()
    assert (centres <= high + 1e-3).all()
    assert (np.abs(np.diff(centres, axis=0)) <= 3.2 * np.sqrt(0.5) + 1e-3).all()


def test_the_first_thing_stands_in_front():
    scene = parse_caption("a red square stands still and a blue square stands still")
    placed = world.place(scene, world.draw_openings(0))
    frame = worlds.film_placed(placed._replace(start=np.float32([[64, 40], [76, 40]])), 1)[0]
    assert tuple(frame[40, 70]) == COLOURS["red"]
    assert tuple(frame[40, 82]) == COLOURS["blue"]


def test_held_out_scenes_are_never_trained_on():
    kept_out = {scene.caption() for scene in world.held_out_scenes(64)}
    assert len(kept_out) == 64
    words = lambda thing: (thing.colour, thing.shape, thing.motion)  # noqa: E731
    firsts = {words(parse_caption(caption).things[0]) for caption in kept_out}
    drawn = [world.training_scene(seed) for seed in range(3000)]
    assert len({words(thing) for scene in drawn for thing in scene.things}) > 300
    assert not firsts & {words(thing) for scene in drawn for thing in scene.things}


def test_every_word_is_still_learned():
    firsts = [world.training_scene(seed).things[0] for seed in range(4000)]
    for pair in itertools.combinations(("colour", "shape", "motion"), 2):
        seen = {tuple(getattr(thing, key) for key in pair) for thing in firsts}
        possible = {"colour": len(COLOURS), "shape": len(SHAPES), "motion": len(MOTIONS)}
        missing = 2 if {"shape", "motion"} == set(pair) else 0  # circles and rings do not spin
        assert len(seen) == possible[pair[0]] * possible[pair[1]] - missing, pair


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"colour": "mauve"}, "colour"),
        ({"shape": "blob"}, "shape"),
        ({"motion": "flies"}, "motion"),
        ({"size": "tiny"}, "size"),
    ],
)
def test_words_the_world_does_not_know_are_refused(changes, name):
    words = {"colour": "red", "shape": "star", "motion": "spins"} | changes
    with pytest.raises(BadInputError, match=f"{name} is "):
        Thing(**words)


@pytest.mark.parametrize("motion", ["spins", "grows and shrinks", "stands still"])
def test_a_speed_belongs_to_what_moves(motion):
    with pytest.raises(BadInputError, match="speed is 'slowly'"):
        parse_caption(f"a red square {motion} slowly")


def test_other_looks_keep_places_motions_and_background():
    scenes = [world.training_scene(seed) for seed in range(1000)]
    kept = {"colour": [], "shape": []}
    for seed, scene in enumerate(scenes):
        other = world.other_looks(scene, seed)
        assert other == world.other_looks(scene, seed) != scene
        assert not world.is_held_out(other)
        assert other.background == scene.background
        assert len({thing.colour for thing in other.things}) == len(scene.things)
        poses = [world.pose(world.place(s, world.draw_openings(seed)), jnp.int32(9)) for s in (scene, other)]
        np.testing.assert_allclose(poses[1].centre, poses[0].centre, atol=1e-4)
        for old, new in zip(scene.things, other.things, strict=True):
            assert (new.motion, new.speed) == (old.motion, old.speed)
            for key, values in kept.items():
                values.append(getattr(old, key) == getattr(new, key))
    # Half of the words are drawn anew, and then seldom the old one again.
    assert all(0.45 < np.mean(values) < 0.62 for values in kept.values())
