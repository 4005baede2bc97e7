"""Lists and dictionaries of more objects than are looked into."""

from __future__ import annotations

from exact.runs import Case, Net, check, shuffled, train


class Cell:
    def __init__(self):
        self.weight = 1.0


class Crowded(Net):
    """Weighs each sample with an object of its own, of which there are many."""

    def __init__(self):
        super().__init__()
        self.cells = [Cell() for _ in range(1500)]
        self.by_name = {f"cell {i}": Cell() for i in range(1200)}

    def loss(self, batch):
        self.cells[1400].weight *= 0.9
        self.by_name["cell 1100"].weight *= 0.9
        return super().loss(batch) * self.cells[1400].weight * self.by_name["cell 1100"].weight


def test_numbers_of_many_objects_in_a_list_go_on(tmp_path):
    check(Case(shuffled, Crowded, at=[3, 8]), tmp_path)


def test_what_else_many_objects_have_is_named(tmp_path, caplog):
    class Listed(Crowded):
        def __init__(self):
            super().__init__()
            for cell in self.cells:
                cell.seen = [0]

        def on_train_batch_end(self, *args):
            for cell in self.cells:
                cell.seen[0] += 1

    train(Case(shuffled, Listed, steps=2), tmp_path, 1)
    assert "module.cells has changed since training began, and is not saved: it holds more objects" in caplog.text
