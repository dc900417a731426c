from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from shim.contract.settings import Settings
from shim.oci import gojson
from shim.oci.config import (
    BASE_LABEL,
    LAYER_LABEL,
    ORIGINAL_LABEL,
    PatchOptions,
    State,
    cautions,
    check_config,
    check_platform,
    detect,
    patch_config,
    restore,
    top_is_labelled,
    write_config,
)
from shim.oci.errors import ImageUnsuitable

A, B, C, D = (f"sha256:{letter * 64}" for letter in "abcd")
CMD, ENTRYPOINT, USER = (
    f"GRAND_CHALLENGE_COMPONENT_{name}" for name in ("CMD_B64J", "ENTRYPOINT_B64J", "USER")
)


def image(history: object = ..., layers: tuple[str, ...] = (A,), **inner: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "created": "2024-01-01T00:00:00Z",
        "architecture": "amd64",
        "os": "linux",
        "config": inner,
        "rootfs": {"type": "layers", "diff_ids": [*layers]},
    }
    if history is not ...:
        config["history"] = history
    return config


def patch(config: dict[str, Any], diff_id: str = B, **options: Any) -> dict[str, Any]:
    patched = patch_config(
        config, PatchOptions(**options), diff_id=diff_id, base_id=C, version="1.2.3"
    )
    check_config(patched, layers=len(config["rootfs"]["diff_ids"]) + 1)
    return patched


def variables(config: dict[str, Any]) -> dict[str, str]:
    pairs = [item.split("=", 1) for item in config["config"]["Env"] if "=" in item]
    assert len(pairs) == len({name for name, _ in pairs})
    return dict(pairs)


def test_the_result_is_what_platforms_check() -> None:
    config = patch(image(Cmd=["sh"], Env=["PATH=/bin", "X", "EMPTY="], User="alg"))
    inner = config["config"]
    assert ["/sagemaker-shim"] == inner["Entrypoint"]
    assert "Cmd" not in inner
    assert "0" == inner["User"]
    assert ["PATH=/bin", "X", "EMPTY="] == inner["Env"][:3]
    assert {
        "PATH": "/bin",
        "EMPTY": "",
        CMD: "WyJzaCJd",
        ENTRYPOINT: "bnVsbA==",
        USER: "alg",
    } == variables(config)
    assert [A, B] == config["rootfs"]["diff_ids"]


@pytest.mark.parametrize(
    ("entrypoint", "cmd"),
    [
        pytest.param(["/a"], None, id="null"),
        pytest.param(None, ["sh", "-c", 'é "x" && y'], id="shell form"),
        pytest.param(["a", "b"], ["c"], id="both"),
        pytest.param([], ["c"], id="empty"),
    ],
)
def test_the_shim_reads_what_is_recorded(entrypoint: Any, cmd: Any) -> None:
    config = patch(image(Entrypoint=entrypoint, Cmd=cmd, User="1000:5"))
    settings = Settings.from_environ(variables(config))
    assert tuple(entrypoint or ()) == (settings.entrypoint or ())
    assert tuple(cmd or ()) == (settings.cmd or ())
    assert "1000:5" == settings.user


def test_no_variable_of_the_base_can_choose_the_user() -> None:
    hostile = [
        f"{USER}=root",
        f"{USER}=0",
        f"{USER.lower()}=root",
        "Grand_Challenge_Component_Set_Extra_Groups=root:0",
        "GRAND_CHALLENGE_ANYTHING",
        "ﬁne=1",
    ]
    config = patch(image(Cmd=["sh"], Env=hostile, User="alg"))
    assert ["ﬁne=1", f"{CMD}=WyJzaCJd", f"{ENTRYPOINT}=bnVsbA==", f"{USER}=alg"] == config[
        "config"
    ]["Env"]


def test_options_override_what_is_recorded_and_add_to_the_rest() -> None:
    config = patch(
        image(Cmd=["sh"], Env=["A=1", "B=2", "A=3"], Labels={"z": "1", "a": "2"}),
        entrypoint=("/x", "y"),
        cmd=(),
        user="0:0",
        env=(("A", "9"), ("C", "")),
        labels=(("m", "n"),),
    )
    assert json.loads(base64.b64decode(variables(config)[ENTRYPOINT])) == ["/x", "y"]
    assert json.loads(base64.b64decode(variables(config)[CMD])) == []
    assert "0:0" == config["config"]["User"]
    assert "B=2" == config["config"]["Env"][0]
    assert ["A=9", "C="] == config["config"]["Env"][-2:]
    labels = config["config"]["Labels"]
    assert ("n", "1", "2") == (labels["m"], labels["z"], labels["a"])
    assert sorted(labels) == [*labels]


def test_an_image_that_starts_nothing_is_refused() -> None:
    with pytest.raises(ImageUnsuitable, match="neither ENTRYPOINT nor CMD"):
        patch(image(Entrypoint=None, Cmd=[]))
    assert patch(image(), cmd=("sh",))


@pytest.mark.parametrize(
    ("history", "added"),
    [
        pytest.param([{"created_by": "x"}], True, id="one a layer"),
        pytest.param([{"empty_layer": True}, {}], True, id="empty layers do not count"),
        pytest.param([{"empty_layer": True}], False, id="too short"),
        pytest.param([{}, {}], False, id="too long"),
        pytest.param([], False, id="empty"),
        pytest.param(None, False, id="null"),
        pytest.param(..., False, id="absent"),
    ],
)
def test_history_grows_only_where_it_matches_the_layers(history: Any, added: bool) -> None:
    base = image(history, Cmd=["sh"])
    config = patch(base)
    if added:
        assert history == config["history"][:-1]
        entry = config["history"][-1]
        assert "sagemaker-shim patch 1.2.3" == entry["created_by"]
        assert base["created"] == entry["created"]
    else:
        assert base.get("history", ...) == config.get("history", ...)
    assert base == restore(config, drop_layer=True)


BASES = {
    "null config": {**image(), "config": None},
    "no config": {name: value for name, value in image().items() if name != "config"},
    "nulls": image(Env=None, Cmd=None, Entrypoint=["a"], Labels=None, User=""),
    "strange order": image(Labels={"b": "<", "a": "&"}, Cmd=["sh"], User="alg", Env=["X", "X"]),
    "unknown members": {**image(Cmd=["sh"], Healthcheck={"StartInterval": 5}), "X-Y": [1]},
    "reserved variables": image(Cmd=["sh"], Env=[f"{USER}=x", "GRAND_CHALLENGE_=y"], User="a"),
}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_undoing_restores_each_byte(base: dict[str, Any], end: bytes) -> None:
    body = gojson.dumps(base) + end
    config = gojson.loads(body, name="config")
    patched = patch(config, cmd=("sh",), env=(("A", "1"),), labels=(("b", "2"),))
    written = write_config(patched, like=body)
    assert written.endswith(end)
    read = gojson.loads(written, name="config")
    assert State.OURS is detect(read)
    assert top_is_labelled(read)
    assert body == write_config(restore(read, drop_layer=True), like=written)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_patching_twice_is_patching_once(base: dict[str, Any]) -> None:
    once = patch(base, cmd=("sh",))
    assert once == patch(restore(once, drop_layer=True), cmd=("sh",))
    newer = patch(restore(once, drop_layer=True), D, cmd=("sh",))
    assert [A, D] == newer["rootfs"]["diff_ids"]


def crane(**inner: Any) -> dict[str, Any]:
    """An image as crane mutate leaves it (image-spec order is lost, history has an empty entry)."""
    env = inner.pop("Env", []) + [f"{CMD}=WyJzaCJd", f"{ENTRYPOINT}=bnVsbA==", f"{USER}=alg"]
    history = [{"created_by": "x"}, {"created": "0001-01-01T00:00:00Z"}]
    return image(history, (A, B), Entrypoint=["/sagemaker-shim"], Env=env, User="0", **inner)


def test_what_the_existing_tool_has_patched_is_undone_from_its_variables() -> None:
    config = crane(Env=["PATH=/bin"], WorkingDir="/x")
    assert State.UPSTREAM is detect(config)
    base = image([{"created_by": "x"}], User="alg", Env=["PATH=/bin"], Cmd=["sh"], WorkingDir="/x")
    assert base == restore(config, drop_layer=True)
    kept = restore(config, drop_layer=False)
    assert ([A, B], config["history"]) == (kept["rootfs"]["diff_ids"], kept["history"])


def test_the_last_of_several_records_counts() -> None:
    config = crane(Env=[f"{CMD}=bnVsbA==", f"{USER}=other"])
    assert ["sh"] == restore(config, drop_layer=True)["config"]["Cmd"]
    assert "alg" == restore(config, drop_layer=True)["config"]["User"]


def test_an_image_built_on_a_patched_one_loses_what_it_inherited() -> None:
    config = patch(image(Cmd=["sh"], User="alg"))
    config["config"] |= {"Entrypoint": ["/new"], "Cmd": None, "User": "other"}
    assert State.DERIVED is detect(config)
    base = restore(config, drop_layer=False)
    assert {"User": "other", "Entrypoint": ["/new"]} == base["config"]
    assert [A, B] == base["rootfs"]["diff_ids"]


def test_an_image_with_layers_above_ours_keeps_them() -> None:
    config = patch(image(Cmd=["sh"], User="alg", Labels={"a": "b"}))
    config["rootfs"]["diff_ids"].append(D)
    assert State.OURS is detect(config)
    assert not top_is_labelled(config)
    base = restore(config, drop_layer=False)
    assert {"User": "alg", "Cmd": ["sh"], "Labels": {"a": "b"}} == base["config"]


@pytest.mark.parametrize(
    "inner",
    [
        {"Entrypoint": ["/sagemaker-shim"]},
        {"Entrypoint": ["/sagemaker-shim"], "Env": [f"{CMD}=WyJzaCJd"]},
        {"Cmd": ["/sagemaker-shim", "serve"]},
        {"Entrypoint": ["/sagemaker-shim", "serve"], "Env": [f"{CMD}=x", f"{ENTRYPOINT}=x"]},
    ],
)
def test_a_shim_that_would_start_itself_is_refused(inner: dict[str, Any]) -> None:
    assert State.BROKEN is detect(image(**inner))
    with pytest.raises(ImageUnsuitable, match="does not say what"):
        restore(image(**inner), drop_layer=False)


@pytest.mark.parametrize("text", ["not base64", "e30=", "WzFd", "Ww=="])
def test_a_record_that_is_no_command_is_refused(text: str) -> None:
    with pytest.raises(ImageUnsuitable):
        restore(crane(Env=[]) | image(**{
            "Entrypoint": ["/sagemaker-shim"],
            "Env": [f"{CMD}={text}", f"{ENTRYPOINT}=bnVsbA=="],
        }), drop_layer=False)  # fmt: skip


@pytest.mark.parametrize(
    "text", ['{"Env":5}', "[1]", "{", '{"user":"root"}', '{"User":"a","User":"b"}', "5"]
)
def test_a_forged_record_of_the_original_is_refused(text: str) -> None:
    forged = patch(image(Cmd=["sh"]))
    forged["config"]["Labels"][ORIGINAL_LABEL] = text
    with pytest.raises(ImageUnsuitable):
        restore(forged, drop_layer=True)


def test_an_image_that_nobody_has_patched_is_left_alone() -> None:
    base = image(Cmd=["sh"], Env=["GRAND_CHALLENGE_X=1"], Labels={})
    assert State.PLAIN is detect(base)
    assert base == restore(base, drop_layer=False)


@pytest.mark.parametrize("user", ["", "root", "0", "00", "+0", "-0", "0:5", "root:x"])
def test_a_forged_record_of_root_is_refused(user: str) -> None:
    labelled = patch(image(Cmd=["sh"], User=user))
    assert restore(labelled, drop_layer=True)
    labelled["config"]["User"] = "1000"
    with pytest.raises(ImageUnsuitable, match="runs as '1000'"):
        restore(labelled, drop_layer=True)
    forged = crane()
    forged["config"] |= {"User": "1000", "Env": [*forged["config"]["Env"], f"{USER}={user}"]}
    with pytest.raises(ImageUnsuitable, match="runs as '1000'"):
        restore(forged, drop_layer=True)


def test_a_shim_of_another_user_can_be_replaced() -> None:
    base = image(Cmd=["sh"], User="alg")
    assert base == restore(patch(base, user="1000"), drop_layer=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (image(env=["A=1"]), "'env'"),
        (image(**{"Uſer": "root"}), "'User'"),
        ({**image(), "Config": {}}, "'Config'"),
        ({**image(), "rootfs": {"type": "layers", "Diff_IDs": [A]}}, "'diff_ids'"),
        (image(Env="A=1"), "Env"),
        (image(Env=[1]), "Env"),
        (image(Cmd="sh"), "Cmd"),
        (image(Entrypoint={}), "Entrypoint"),
        (image(User=5), "User"),
        (image(Labels=["a"]), "Labels"),
        (image(Labels={"a": 1}), "Labels"),
        (image("x"), "history"),
        (image([1]), "history"),
        ({**image(), "config": [1]}, "objects"),
        ({**image(), "rootfs": None}, "objects"),
        ({**image(), "rootfs": {"type": "x", "diff_ids": [A]}}, "type"),
        ({**image(), "rootfs": {"type": "layers", "diff_ids": ["x"]}}, "digests"),
        (image(layers=(A, B)), "1 layers, but 2"),
        (image(layers=()), "1 layers, but 0"),
    ],
)
def test_refuses_what_runtimes_read_differently(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageUnsuitable, match=message):
        check_config(config, layers=1)


def test_names_in_free_maps_may_have_any_case() -> None:
    check_config(image(Labels={"env": "x", "Env": "y"}, ExposedPorts={"user": {}}), layers=1)


@pytest.mark.parametrize(
    ("changed", "machine"),
    [
        ({}, 183),
        ({"architecture": "arm64"}, 62),
        ({"os": "windows"}, 62),
        ({"architecture": None}, 62),
        ({"os": None}, 62),
        ({"architecture": "AMD64"}, 62),
    ],
)
def test_another_platform_is_refused(changed: dict[str, Any], machine: int) -> None:
    check_platform(image(), machine=62)
    with pytest.raises(ImageUnsuitable, match="The image is for"):
        check_platform(image() | changed, machine=machine)


def test_cautions_name_what_may_surprise() -> None:
    assert [] == cautions(image(Env=["XTMPDIR=/x"]))
    found = cautions(image(Env=["TMPDIR=/x"], Healthcheck={"Test": ["NONE"]}))
    assert ["TMPDIR", "HEALTHCHECK"] == [
        word for sentence in found for word in ("TMPDIR", "HEALTHCHECK") if word in sentence
    ]


def test_labels_say_what_was_put_where() -> None:
    labels = patch(image(Cmd=["sh"]))["config"]["Labels"]
    assert (B, C, '{"Cmd":["sh"]}') == (
        labels[LAYER_LABEL],
        labels[BASE_LABEL],
        labels[ORIGINAL_LABEL],
    )
