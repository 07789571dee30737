"""GPUs are dealt to the engines of a cluster in order."""

from pathlib import Path

from jaxdual.cluster.devices import devices_of

NAME = "CUDA_VISIBLE_DEVICES"


def test_engines_take_the_gpus_of_the_machine_in_order(tmp_path: Path) -> None:
    for name in ("nvidia10", "nvidia0", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert [devices_of(number, 1, {}, tmp_path)[NAME] for number in range(4)] == ["0", "2", "10", "0"]


def test_named_gpus_are_kept_to() -> None:
    environment = {NAME: "GPU-a, GPU-b"}
    assert [devices_of(number, 1, environment)[NAME] for number in range(3)] == ["GPU-a", "GPU-b", "GPU-a"]
    assert devices_of(0, 1, {NAME: ""}) == {}


def test_a_machine_without_gpus_sets_nothing(tmp_path: Path) -> None:
    assert devices_of(1, 1, {}, tmp_path) == {}


def test_engines_with_several_gpus_take_neighbours() -> None:
    environment = {NAME: "4,5,6"}
    assert devices_of(0, 2, environment)[NAME] == "4,5"
    assert devices_of(2, 2, environment)[NAME] == "6,4"
    assert devices_of(0, 4, environment)[NAME] == "4,5,6"
