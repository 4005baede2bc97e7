"""What an object keeps of its constructor's arguments."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import pickle
import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

import ctxmod
import fiddle as fdl
import pytest
import torch
from ctxmod import Anything, Base, Cfg, Model, Part, SubCfg, SubModel

from nemologger.errors import ConfigurationError, ContextError
from nemologger.io import IOMixin, config_of, load_context, reinit, track_io


def arguments(config: Any) -> dict[Any, Any]:
    return dict(config.__arguments__)


def test_positional_and_keyword_arguments_are_kept_by_name_and_defaults_are_not():
    config = Model(Cfg(dim=16), name="x").__io__

    assert isinstance(config, fdl.Config)
    assert fdl.get_callable(config) is Model
    assert set(arguments(config)) == {"config", "name"}
    assert arguments(config.config) == {"dim": 16}


def test_variadic_arguments_come_back_as_they_were():
    made = Anything(1, "two", cls=3, self_=4)
    again = reinit(made)

    assert again.args == (1, "two")
    assert again.kwargs == {"cls": 3, "self_": 4}


def test_variadic_arguments_after_named_ones_come_back():
    class Mixed(IOMixin):
        def __init__(self, first, /, second, *rest, key=0, **more):
            self.all = (first, second, rest, key, more)

    assert reinit(Mixed(1, 2, 3, 4, key=5, other=6)).all == (1, 2, (3, 4), 5, {"other": 6})


def test_a_subclass_keeps_its_own_arguments_and_not_those_of_super():
    assert arguments(SubModel(5, betas=(0.1, 0.2)).__io__) == {"width": 5, "betas": (0.1, 0.2)}


def test_an_inherited_constructor_is_captured_with_the_class_that_was_called():
    class Same(Model):
        pass

    config = Same(Cfg()).__io__
    assert fdl.get_callable(config) is Same
    assert set(arguments(config)) == {"config"}


def test_the_mixin_may_stand_before_the_class_that_has_the_constructor():
    class Sub(IOMixin, Base):
        pass

    assert arguments(Sub(3).__io__) == {"x": 3}
    assert list(inspect.signature(Sub).parameters) == ["x", "y"]


def test_default_factories_of_a_dataclass_are_left_out():
    assert arguments(Cfg(dim=2).__io__) == {"dim": 2}


def test_a_plain_dataclass_instance_becomes_a_config_of_what_differs_from_its_defaults():
    config = Cfg(sub=SubCfg(heads=2)).__io__.sub
    assert fdl.get_callable(config) is SubCfg
    assert arguments(config) == {"heads": 2}


def test_partials_become_partials_and_functions_classes_and_dtypes_stay_bare():
    made = Model(
        Cfg(dtype=torch.bfloat16),
        optim=functools.partial(torch.optim.Adam, lr=1e-3),
        loss_fn=torch.nn.functional.l1_loss,
        parts=[torch.optim.SGD],
    )
    config = made.__io__
    assert isinstance(config.optim, fdl.Partial)
    assert config.optim.lr == 1e-3
    assert config.loss_fn is torch.nn.functional.l1_loss
    assert config.parts == [torch.optim.SGD]
    assert config.config.dtype is torch.bfloat16


def test_a_partial_with_positional_arguments_takes_the_rest_in_the_same_places():
    again = reinit(Part(functools.partial(ctxmod.scaled, 3)))
    assert again.fn(5) == 15


def test_a_partial_of_a_function_without_a_signature_is_kept():
    again = reinit(Part(functools.partial(torch.clamp, min=0.0)))
    assert again.fn(torch.tensor(-1.0)) == 0


def test_containers_are_kept_as_they_were_passed():
    tags, table = ["a", [1]], {"k": {"deep": 1}}
    made = Anything(tags, table)
    tags.append("b")
    tags[1].append(2)
    table["k"]["deep"] = 2

    assert made.__io__[:] == [["a", [1]], {"k": {"deep": 1}}]


def test_a_config_that_was_passed_is_kept_as_it_was():
    config = fdl.Config(Part, fn=1)
    made = Anything(config)
    config.fn = 2
    assert made.__io__[0].fn == 1


def test_a_dataclass_changed_before_it_is_passed_is_kept_as_changed():
    config = Cfg(dim=8)
    config.dim = 16
    config.sub.heads = 1
    assert arguments(Model(config).__io__.config) == {"dim": 16, "sub": fdl.Config(SubCfg, heads=1)}


def test_a_dataclass_changed_after_it_was_passed_is_kept_as_it_was():
    config = Cfg(dim=8)
    made = Model(config)
    config.dim = 16
    assert made.__io__.config.dim == 8


def test_what_post_init_sets_is_not_taken_for_a_change_by_the_user():
    made = ctxmod.Scaled(lr=0.5)
    assert arguments(Anything(made).__io__[0]) == {"lr": 0.5}
    made.tag = "mine"
    assert arguments(Anything(made).__io__[0]) == {"lr": 0.5, "tag": "mine"}


def test_an_object_given_twice_stays_one_object():
    part = Part(1)
    again = reinit(Anything(part, [part]))
    assert again.args[0] is again.args[1][0]


def test_tensors_and_modules_are_shared_and_not_copied():
    weight, layer = torch.ones(3), torch.nn.Linear(1, 1)
    config = Anything(weight, [layer]).__io__
    assert config[0] is weight
    assert config[1][0] is layer


def test_what_cannot_be_captured_does_not_break_construction():
    class Awkward:
        @property
        def __dict__(self):
            raise RuntimeError("leave me alone")

    endless: list[Any] = []
    endless.append(endless)
    assert len(Anything(Awkward(), endless, a=lambda: 1).args) == 2

    @dataclass
    class Broken:
        value: int = field(default_factory=lambda: 1 // len(endless[1:]))

    assert isinstance(Part(object.__new__(Broken)), Part)


def test_wrong_arguments_raise_what_python_raises():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'config'"):
        Model()

    class Empty(IOMixin):
        pass

    with pytest.raises(TypeError, match="takes no arguments"):
        Empty(1)


def test_frozen_and_slotted_classes_can_be_made():
    @dataclass(frozen=True)
    class Frozen(IOMixin):
        x: int

    class Slotted:
        __slots__ = ("x",)

        def __init__(self, x):
            self.x = x

    assert Frozen(1).__io__.x == 1
    assert track_io(Slotted)(2).x == 2
    assert not hasattr(Slotted(2), "__io__")


def test_copies_keep_their_arguments_and_share_no_containers():
    made = Model(Cfg(), parts=[1])
    for other in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other.__io__ == made.__io__
    copy.deepcopy(made).__io__.parts.append(2)
    assert made.__io__.parts == [1]


def test_an_argument_that_cannot_be_pickled_does_not_stop_the_object_from_being_pickled():
    class Keeps(Part):
        def __init__(self, fn, n=1):
            super().__init__(None, n)

    Keeps.__qualname__, ctxmod.Keeps = "Keeps", Keeps
    Keeps.__module__ = "ctxmod"
    try:
        again = pickle.loads(pickle.dumps(Keeps(lambda: 1, n=3)))
    finally:
        del ctxmod.Keeps
    assert again.__io__.n == 3
    assert "another process" in again.__io__.fn.reason


def test_track_io_captures_another_librarys_class_and_its_subclasses_once():
    class Theirs:
        def __init__(self, x, y=2):
            self.x, self.y = x, y

    class Sub(Theirs):
        def __init__(self, z):
            super().__init__(z + 1)

    assert track_io(Theirs) is Theirs
    before = Theirs.__new__
    assert track_io(Theirs) is Theirs
    assert Theirs.__new__ is before
    assert arguments(Theirs(1).__io__) == {"x": 1}
    assert arguments(Sub(5).__io__) == {"z": 5}
    assert list(inspect.signature(Sub).parameters) == ["z"]


def test_track_io_of_an_object_means_its_class():
    class Theirs:
        def __init__(self, x):
            self.x = x

    instance = Theirs(1)
    assert track_io(instance) is instance
    assert Theirs(2).__io__.x == 2


def test_track_io_keeps_a_new_of_the_class():
    class Single:
        made: Any = None

        def __new__(cls, x):
            cls.made = super().__new__(cls)
            return cls.made

        def __init__(self, x):
            self.x = x

    track_io(Single)
    one = Single(4)
    assert Single.made is one
    assert one.__io__.x == 4


def test_track_io_does_not_disturb_save_hyperparameters_of_a_subclass():
    import lightning.pytorch as pl

    class Theirs(pl.LightningModule):
        def __init__(self, x):
            super().__init__()
            self.save_hyperparameters()

    class Sub(Theirs):
        def __init__(self, x, y):
            super().__init__(x)

    track_io(Theirs)
    assert dict(Sub(1, 2).hparams) == {"x": 1, "y": 2}


def test_a_tracked_function_captures_its_call():
    @track_io
    def make(width, depth=1):
        return torch.nn.Linear(width, depth)

    config = config_of(make(3))
    assert fdl.get_callable(config) is make
    assert arguments(config) == {"width": 3}
    assert track_io(make) is make


def test_a_class_written_in_c_is_refused_by_name():
    with pytest.raises(ConfigurationError, match=r"builtins.dict cannot be tracked.*Derive a class"):
        track_io(dict)


def test_reinit_makes_a_fresh_object_from_the_arguments():
    made = Model(Cfg(dim=3), parts=[1])
    made.parts.append(2)
    again = reinit(made)
    assert again is not made
    assert again.parts == [1]
    assert again.config.dim == 3
    assert again.config is not made.config


def test_reinit_of_what_was_not_captured_says_so():
    with pytest.raises(ContextError, match=r"cannot make another ctxmod\.Plain: its class neither inherits IOMixin"):
        reinit(ctxmod.Plain())


def test_io_can_be_assigned():
    made = Part(1)
    made.__io__ = fdl.Config(Part, fn=7)
    assert reinit(made).fn == 7
    with pytest.raises(ConfigurationError, match=r"must be an fdl.Config, not int"):
        made.__io__ = 3


def test_hyperparameters_stand_in_for_captured_arguments():
    assert arguments(config_of(ctxmod.HparamsModel(3))) == {"width": 3, "lr": 0.1}


def test_a_required_argument_left_out_of_the_hyperparameters_is_named():
    config = config_of(ctxmod.NeedsNet(torch.nn.ReLU(), lr=0.2))
    assert config.lr == 0.2
    assert config.net.what == "the argument 'net'"
    assert "left it out" in config.net.reason


def test_hyperparameters_are_those_of_the_construction():
    model = ctxmod.HparamsModel(3)
    model.hparams.width = 9
    assert config_of(model).width == 3


def test_a_module_without_arguments_needs_no_capture():
    class Quiet(torch.nn.Module):
        def __init__(self):
            super().__init__()

    assert arguments(config_of(Quiet())) == {}


def test_nothing_is_known_of_other_objects():
    assert config_of(ctxmod.Plain()) is None
    assert config_of(ctxmod.Forgetful(1)) is None
    assert config_of(Model) is None


_NAMES_FOR_TYPE_CHECKERS = """
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from nemologger.io import IOMixin

if TYPE_CHECKING:
    from somewhere import Thing

@dataclass
class Sizes:
    width: int = 8
    thing: Thing | None = None

def scaled(x: Thing, k: int) -> Thing:
    return x * k

class Model(pl.LightningModule, IOMixin):
    def __init__(self, sizes: Sizes, thing: Thing, scale: partial[Thing]) -> None:
        super().__init__()
        self.sizes, self.thing, self.scale = sizes, thing, scale
"""


def test_annotations_may_name_what_only_type_checkers_import(tmp_path, monkeypatch):
    """From Python 3.14 on they do without ``from __future__ import annotations``."""
    header = "" if sys.version_info >= (3, 14) else "from __future__ import annotations\n"
    (tmp_path / "annotated.py").write_text(header + _NAMES_FOR_TYPE_CHECKERS)
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        here = importlib.import_module("annotated")
        here.Model(here.Sizes(width=3), 5, functools.partial(here.scaled, k=2)).io_dump(tmp_path / "context")
        monkeypatch.delitem(sys.modules, "annotated")
        elsewhere = importlib.import_module("annotated")  # where nothing was asked yet
        again = load_context(tmp_path / "context")
    monkeypatch.delitem(sys.modules, "annotated")
    assert isinstance(again, elsewhere.Model)
    assert (again.sizes, again.thing, again.scale(4)) == (elsewhere.Sizes(width=3), 5, 8)
