"""A stranger's context runs none of their code: every attack here is refused, with the entry named."""

from __future__ import annotations

import importlib
import json
import sys
import warnings

import ctxmod
import fiddle as fdl
import pytest

from nemologger.context.policy import Policy, origin_of
from nemologger.errors import ConfigurationError, ContextError, NemologgerError, RefusedError
from nemologger.io import load_context

PYTHON = [
    ("os", "popen"),
    ("os", "system"),
    ("posix", "system"),
    ("subprocess", "getoutput"),
    ("subprocess", "Popen"),
    ("subprocess", "run"),
    ("runpy", "run_path"),
    ("shutil", "rmtree"),
    ("importlib", "import_module"),
    ("pickle", "loads"),
    ("_pickle", "loads"),
    ("ctypes", "CDLL"),
    ("zipfile", "ZipFile"),
    ("tempfile", "NamedTemporaryFile"),
    ("logging", "FileHandler"),
    ("threading", "Thread"),
    ("multiprocessing.context", "Process"),
    ("operator", "attrgetter"),
    ("functools", "reduce"),
    ("types", "FunctionType"),
    ("types", "CodeType"),
    ("code", "InteractiveInterpreter"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "compile"),
    ("builtins", "getattr"),
    ("builtins", "setattr"),
    ("builtins", "open"),
    ("builtins", "__import__"),
    ("builtins", "type"),
    ("builtins", "map"),
    ("builtins", "print"),
]
TORCH = [
    ("torch", "load"),
    ("torch", "save"),
    ("torch.serialization", "load"),
    ("torch", "from_file"),
    ("torch", "compile"),
    ("torch.hub", "load"),
    ("torch.hub", "load_state_dict_from_url"),
    ("torch.hub", "download_url_to_file"),
    ("torch.utils.cpp_extension", "load"),
    ("torch.utils.cpp_extension", "load_inline"),
    ("torch.jit", "load"),
    ("torch.jit._serialization", "load"),
    ("torch._C", "import_ir_module"),
    ("torch.package", "PackageImporter"),
    ("torch.package.package_importer", "PackageImporter"),
    ("torch.multiprocessing", "spawn"),
    ("torch.distributed.launcher.api", "elastic_launch"),
    ("torch.distributed.launcher.api", "LaunchConfig"),
    ("torch.distributed.run", "main"),
    ("torch.distributed.checkpoint.state_dict_loader", "load"),
    ("torch.distributed.checkpoint", "FileSystemReader"),
    ("torch.fx", "GraphModule"),
    ("torch.fx.graph_module", "GraphModule"),
    ("torch.nn.modules.module", "Module.load_state_dict"),
    ("torch.utils.data.datapipes.iter.fileopener", "FileOpenerIterDataPipe"),
    ("torch.utils.tensorboard", "SummaryWriter"),
    ("torch.nn.functional", "importlib"),
    ("torch.nn.functional", "torch.hub.load"),
    ("torch", "hub.load"),
    ("torch", "ops"),
    ("torch", "ops.load_library"),
    ("torch", "classes.load_library"),
]
LIGHTNING = [
    ("lightning.pytorch.cli", "LightningCLI"),
    ("lightning.pytorch.core.saving", "load_hparams_from_yaml"),
    ("lightning.pytorch.core.saving", "_load_from_checkpoint"),
    ("lightning.pytorch.core.module", "LightningModule.load_from_checkpoint"),
    ("lightning.fabric.utilities.cloud_io", "_load"),
    ("lightning.pytorch.loggers.comet", "CometLogger"),
    ("lightning.pytorch.loggers.mlflow", "MLFlowLogger"),
    ("lightning.pytorch.strategies.launchers.subprocess_script", "_SubprocessScriptLauncher"),
    ("lightning.pytorch.utilities.migration.utils", "migrate_checkpoint"),
    ("lightning", "Fabric"),
    ("lightning.pytorch.trainer.trainer", "Trainer.fit"),
]
PACKAGES = [
    ("numpy", "load"),
    ("numpy", "memmap"),
    ("numpy", "fromfile"),
    ("yaml", "unsafe_load"),
    ("yaml", "load"),
    ("fsspec", "open"),
    ("fsspec.core", "OpenFile"),
    ("fsspec.implementations.local", "LocalFileSystem"),
    ("fiddle._src.building", "build"),
    ("fiddle._src.experimental.serialization", "load_json"),
    ("pytest", "main"),
    ("_pytest.pytester", "Pytester"),
    ("nemologger", "train"),
    ("nemologger.io", "load_context"),
    ("nemologger.disk", "LocalDisk"),
    ("nemologger.disk", "LocalDisk.remove"),
    ("nemologger.context.io_json", "load_context"),
    ("nemologger.context.rebuild", "torch.load"),
]
OURS = [
    # Names of the user's own module that lead somewhere else.
    ("ctxmod", "torch.hub.load"),
    ("ctxmod", "enum.sys"),
    ("ctxmod", "pl.Trainer.fit"),
    ("ctxmod", "torch"),
    ("ctxmod", "namedtuple"),
    ("ctxmod", "Model.load_from_checkpoint"),
    ("ctxmod", "Model.load_state_dict"),
    ("ctxmod", "Model.__init__"),
    ("ctxmod", "Model.__init__.__globals__"),
    ("ctxmod", "Model.mro"),
    ("ctxmod", "__builtins__"),
    ("ctxmod", "__loader__.load_module"),
    ("ctxmod", ""),
    ("", "x"),
    (".", "x"),
    ("ctxmod.", "x"),
]

# Nothing stands under these names, which is another error.
NOT_THERE = [("nemologger", "train"), ("ctxmod", "")]

pyref = "pyref"


def reference(module, name):
    return {"type": pyref, "module": module, "name": name}


def leaf(value):
    return {"type": "leaf", "value": value}


def sequence(items, kind="tuple"):
    node = {"type": reference("builtins", kind), "items": [[f"Index(index={i})", item] for i, item in enumerate(items)]}
    return {**node, "metadata": None}


def call(module, name, kind="Config", **arguments):
    home = {"Config": "fiddle._src.config", "TaggedValueCls": "fiddle._src.config"}.get(kind, "fiddle._src.partial")
    metadata = {
        "type": reference("fiddle._src.config", "BuildableTraverserMetadata"),
        "items": [
            ["Attr(name='fn_or_cls')", reference(module, name)],
            ["Attr(name='argument_names')", sequence(arguments)],
            ["Attr(name='argument_tags')", {**sequence([], "dict"), "metadata": sequence([])}],
            ["Attr(name='argument_history')", {**sequence([], "dict"), "metadata": sequence([])}],
        ],
        "metadata": reference("fiddle._src.config", "BuildableTraverserMetadata"),
    }
    items = [[f"Attr(name={key!r})", value] for key, value in arguments.items()]
    return {"type": reference(home, kind), "items": items, "metadata": metadata}


def write(directory, root):
    (directory / "io.json").write_text(json.dumps({"root": root, "objects": {}, "refcounts": {}, "version": "0.0.1"}))
    return directory


@pytest.fixture
def no_evil(tmp_path, monkeypatch):
    """A file that every attack names; nothing may create it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "evil"


@pytest.mark.parametrize(
    "group", [PYTHON, TORCH, LIGHTNING, PACKAGES, OURS], ids=["python", "torch", "lightning", "packages", "ours"]
)
def test_dangerous_references_are_refused_wherever_they_stand(group, tmp_path, no_evil):
    for module, name in group:
        places = {
            "called": call(module, name, x=leaf(f"touch {no_evil}")),
            "called later": call("ctxmod", "Part", fn=call(module, name, "Partial", x=leaf(f"touch {no_evil}"))),
            "called by a partial": call(
                "ctxmod", "Part", fn=call("functools", "partial", func=reference(module, name))
            ),
            "a factory": call(
                "ctxmod", "Part", fn=call("ctxmod", "scaled", "Partial", x=call(module, name, "ArgFactory"))
            ),
            "a value": call("ctxmod", "Part", fn=reference(module, name)),
            "in a list": sequence([leaf(1), reference(module, name)], "list"),
            "a type of node": {"type": reference(module, name), "items": [["", leaf(1)]], "metadata": None},
            "a named tuple": {"type": reference("ctxmod", "Point"), "items": [], "metadata": reference(module, name)},
            "a key": {**sequence([leaf(1)], "dict"), "metadata": sequence([reference(module, name)])},
            "a default": {
                "type": reference("collections", "defaultdict"),
                "items": [],
                "metadata": sequence([reference(module, name), sequence([])]),
            },
        }
        for place, root in places.items():
            write(tmp_path, root)
            with pytest.raises((RefusedError, ContextError)) as caught:
                load_context(tmp_path)
            if place.startswith(("called", "a value", "a factory", "in a list")) and (module, name) not in NOT_THERE:
                assert isinstance(caught.value, RefusedError), (place, caught.value)
            assert str(tmp_path / "io.json") in str(caught.value), place
            if place != "a named tuple":  # its metadata is not even looked at
                assert name in str(caught.value), place
        assert not no_evil.exists(), (module, name)


@pytest.mark.parametrize("module", ["os", "subprocess", "torch", "numpy", "ctxmod"])
def test_imported_modules_are_not_admitted_wholesale(module, tmp_path):
    importlib.import_module(module)
    name = {"os": "popen", "subprocess": "Popen", "torch": "load", "numpy": "load"}.get(module, "torch.load")
    with pytest.raises((RefusedError, ContextError)):
        load_context(write(tmp_path, call(module, name)))


def test_a_refusal_names_the_entry_and_the_way_to_allow_it(tmp_path):
    root = call(
        "ctxmod", "Anything", model=sequence([leaf(1), call("subprocess", "getoutput", cmd=leaf("true"))], "list")
    )
    with pytest.raises(RefusedError) as caught:
        load_context(write(tmp_path, root))
    said = str(caught.value)
    assert said.startswith(
        f"{tmp_path / 'io.json'}: model[1] is subprocess.getoutput: a function of Python itself is not"
    )
    assert "trust=['subprocess']" in said
    assert "trust=True" in said
    assert isinstance(caught.value, PermissionError)


def test_a_module_that_is_not_imported_is_not_imported_by_the_file(tmp_path, monkeypatch):
    (tmp_path / "evilmod.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for root in (call("evilmod", "f"), reference("evilmod", "f"), call("ctxmod", "Part", fn=reference("evilmod", "f"))):
        with pytest.raises(RefusedError, match=r"has not imported evilmod. Import it before .* trust=\['evilmod'\]"):
            load_context(write(tmp_path, root))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_context(write(tmp_path, call("evilmod", "f")), build=False)
    assert "evilmod" not in sys.modules


def test_a_named_package_is_imported_and_admitted_but_not_what_it_imports(tmp_path, monkeypatch):
    (tmp_path / "goodmod.py").write_text("import os, pickle\nfrom os import popen\ndef make(x): return x + 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "goodmod", raising=False)
    try:
        assert load_context(write(tmp_path, call("goodmod", "make", x=leaf(1))), trust=["goodmod"]) == 2
        assert load_context(write(tmp_path, call("goodmod", "make", x=leaf(1))), trust="goodmod") == 2
        for name in ("popen", "os.popen", "pickle.loads"):
            with pytest.raises(RefusedError, match="not admitted"):
                load_context(write(tmp_path, call("goodmod", name)), trust=["goodmod"])
        with pytest.raises(ContextError, match=r"goodmod\.gone, which does not exist here"):
            load_context(write(tmp_path, call("goodmod", "gone")), trust=["goodmod"])
    finally:
        sys.modules.pop("goodmod", None)


def test_a_prefix_is_a_whole_package_name(tmp_path):
    with pytest.raises(RefusedError):
        load_context(write(tmp_path, call("subprocess", "getoutput", cmd=leaf("true"))), trust=["sub", "subprocess_"])


def test_trust_admits_everything_for_that_call_only(tmp_path):
    root = call("subprocess", "getoutput", cmd=leaf("echo ran"))
    assert load_context(write(tmp_path, root), trust=True) == "ran"
    assert load_context(tmp_path, trust=["subprocess"]) == "ran"
    with pytest.raises(RefusedError):
        load_context(tmp_path)


@pytest.mark.parametrize("trust", [[""], ["timm."], [3], "a."])
def test_a_trust_that_names_nothing_is_an_error(trust):
    with pytest.raises(ConfigurationError, match="trust must be"):
        Policy(trust)


def test_what_is_refused_can_be_looked_at_without_building(tmp_path, no_evil):
    root = call("ctxmod", "Part", fn=call("os", "system", x=leaf(f"touch {no_evil}")), n=reference("os", "popen"))
    with pytest.warns(UserWarning, match=r"placeholders(?s:.*)fn is os.system(?s:.*)n is os.popen"):
        config = load_context(write(tmp_path, root), build=False)
    assert config.fn.x == f"touch {no_evil}"
    assert "os.system" in repr(config)
    with pytest.raises(RefusedError, match=r"fn is os.system"):
        fdl.build(config)
    assert not no_evil.exists()


def test_a_tagged_value_calls_nothing(tmp_path):
    root = call("os", "system", "TaggedValueCls", value=leaf("echo"))
    assert load_context(write(tmp_path, root)) == "echo"
    with pytest.raises(NemologgerError):
        load_context(write(tmp_path, call("os", "system", "TaggedValueCls", command=leaf("echo"))))


def test_other_buildables_of_fiddle_are_not_known(tmp_path):
    root = call("ctxmod", "Part", "AutoConfig", fn=leaf(1))
    with pytest.raises(ContextError, match="which is not known here"):
        load_context(write(tmp_path, root))


def test_what_people_configure_is_admitted():
    for module, name in [
        ("ctxmod", "Model"),
        ("ctxmod", "scaled"),
        ("ctxmod", "Plain"),
        ("ctxmod", "Color.RED"),
        ("torch.nn.modules.linear", "Linear"),
        ("torch.optim.adamw", "AdamW"),
        ("torch.optim.lr_scheduler", "CosineAnnealingLR"),
        ("torch.nn.functional", "gelu"),
        ("torch.nn.functional", "relu"),
        ("torch.nn.init", "xavier_uniform_"),
        ("torch", "tanh"),
        ("torch", "zeros"),
        ("torch", "bfloat16"),
        ("torch.utils.data.dataloader", "DataLoader"),
        ("torch.distributed.fsdp.wrap", "size_based_auto_wrap_policy"),
        ("torch.distributed.algorithms.ddp_comm_hooks.default_hooks", "bf16_compress_hook"),
        ("lightning.pytorch.callbacks.early_stopping", "EarlyStopping"),
        ("lightning.pytorch.loggers.tensorboard", "TensorBoardLogger"),
        ("lightning.pytorch.strategies.ddp", "DDPStrategy"),
        ("lightning.pytorch.plugins.precision.amp", "MixedPrecision"),
        ("lightning.fabric.plugins.environments.slurm", "SLURMEnvironment"),
        ("lightning.fabric.utilities.data", "AttributeDict"),
        ("signal", "Signals.SIGUSR1"),
        ("pathlib", "Path"),
        ("pathlib._local", "Path"),
        ("datetime", "timedelta"),
        ("nemologger.trainer", "Trainer"),
        ("nemologger.io", "TrainerContext"),
        ("nemo.lightning.io.pl", "TrainerContext"),
    ]:
        assert Policy().resolve(module, name, "here") is not None


def test_the_main_module_is_the_users_own(monkeypatch):
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__file__", "/home/someone/train.py", raising=False)
    monkeypatch.setattr(main, "SomeModel", type("SomeModel", (), {"__module__": "__main__"}), raising=False)
    assert Policy().resolve("__main__", "SomeModel", "model").__name__ == "SomeModel"
    assert Policy().resolve("__mp_main__", "SomeModel", "model").__name__ == "SomeModel"


def test_whose_code_a_module_is():
    for module, origin in [
        ("ctxmod", "own"),
        ("os", "standard"),
        ("sys", "standard"),
        ("subprocess", "standard"),
        ("xml", "standard"),
        ("numpy", "installed"),
        ("yaml", "installed"),
        ("not.imported", "installed"),
    ]:
        if origin == "standard":
            importlib.import_module(module)
        assert origin_of(module) == origin, module


def test_a_directory_that_a_package_manager_filled_is_not_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "vendored").mkdir()
    for name in ("vendored/__init__.py", "vendored/deep.py", "single.py"):
        (tmp_path / name).write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("vendored", "vendored.deep", "single")
    try:
        for name in names:
            importlib.import_module(name)
            assert origin_of(name) == "own"
        (tmp_path / "vendored-1.0.dist-info").mkdir()
        assert [origin_of(name) for name in names] == ["installed"] * 3
    finally:
        for name in names:
            sys.modules.pop(name, None)


def test_debuggers_outside_of_site_packages_are_not_the_users_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "_pydev_bundle", ctxmod)
    assert origin_of("_pydev_bundle") == "installed"


def test_an_installed_packages_classes_are_admitted_only_if_making_them_runs_nothing(tmp_path, monkeypatch):
    package = tmp_path / "site-packages"
    package.mkdir()
    (package / "thirdparty.py").write_text(
        "import dataclasses, torch\n"
        "from nemologger.io import IOMixin\n"
        "class Runs:\n    def __init__(self, command): pass\n"
        "class Tracked(IOMixin):\n    def __init__(self, x=1): pass\n"
        "class Fast(torch.optim.SGD): pass\n"
        "@dataclasses.dataclass\nclass Data:\n    x: int = 1\n"
        "@dataclasses.dataclass\nclass Hooked:\n    x: int = 1\n    def __post_init__(self): pass\n"
        "@dataclasses.dataclass\nclass Callable:\n    x: int = 1\n    def __call__(self): pass\n"
        "class Net(torch.nn.Module):\n    def __init__(self, name, trust_remote_code=False): pass\n"
        "def function(): pass\n"
    )
    monkeypatch.syspath_prepend(str(package))
    importlib.import_module("thirdparty")
    try:
        for name in ("Tracked", "Fast", "Data"):
            assert Policy().resolve("thirdparty", name, "x").__name__ == name
        for name in ("Runs", "Hooked", "Callable", "Net", "function"):
            with pytest.raises(
                RefusedError, match=r"of the installed package thirdparty is not.*trust=\['thirdparty'\]"
            ):
                Policy().resolve("thirdparty", name, "x")
            assert Policy(["thirdparty"]).resolve("thirdparty", name, "x").__name__ == name
    finally:
        sys.modules.pop("thirdparty", None)
