"""Models that are not, when they are saved, what they were when training started."""

from __future__ import annotations

import pytest
import torch
from exact.runs import Case, Net, shuffled, train
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn

from nemologger.errors import ModelMismatchError


class Grows(Net):
    """A parameter comes in the third step, and the optimizer gets it."""

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 2:
            self.more = nn.Parameter(torch.ones(3))
            self.optimizers().optimizer.add_param_group({"params": [self.more]})


class GrowsAgain(Grows):
    """Makes it from the checkpoint, and the optimizer's group with it."""

    def on_load_checkpoint(self, checkpoint):
        if "more" in checkpoint["state_dict"]:
            self.more = nn.Parameter(torch.empty(3))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-2)
        if hasattr(self, "more"):
            optimizer.add_param_group({"params": [self.more]})
        return optimizer


def test_one_that_has_grown_is_named_at_its_first_save_and_not_only_when_the_run_is_to_go_on(tmp_path, caplog):
    train(Case(shuffled, Grows, steps=5), tmp_path, 1)
    told = [record.getMessage() for record in caplog.records if "the same program cannot go on" in record.getMessage()]
    assert len(told) == 1
    assert "checkpoint step=3, and later ones" in told[0]
    assert "missing in the model: more (3,); optimizer 0 is Adam with groups of 4, 1 parameters in the check" in told[0]
    with pytest.raises(ModelMismatchError, match=r"missing in the model: more \(3,\)"):
        train(Case(shuffled, Grows, steps=6), tmp_path / "again", 1, tmp_path / "step=4")
    train(Case(shuffled, Grows, steps=3), tmp_path / "before", 1, tmp_path / "step=2")


class Backbone(Net):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(4, 4)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize(
    ("model", "callbacks"),
    [(GrowsAgain, list), (Backbone, lambda: [BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)])],
)
def test_nothing_is_said_of_those_that_can_go_on(tmp_path, caplog, model, callbacks):
    case = Case(shuffled, model, steps=9, callbacks=callbacks, trainer={"max_epochs": 2})
    train(case, tmp_path, 1)
    assert "cannot go on" not in caplog.text
    losses, _, _ = train(case, tmp_path / "again", 1, tmp_path / "step=8")
    assert len(losses) == 1


class Wrapped(Net):
    def __init__(self):
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


@pytest.mark.parametrize(("then", "now"), [(Wrapped, Net), (Net, Wrapped)])
def test_names_that_a_compiled_layer_changes_are_said_to_be_its_doing(tmp_path, then, now):
    train(Case(shuffled, then, steps=2), tmp_path, 1)
    with pytest.raises(ModelMismatchError, match=r"torch\.compile\(layer\) puts _orig_mod\.") as raised:
        train(Case(shuffled, now, steps=3), tmp_path / "again", 1, tmp_path / "step=2")
    assert "strict_loading" not in str(raised.value)  # nothing would fit, and training would begin anew
