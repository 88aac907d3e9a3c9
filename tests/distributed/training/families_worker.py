"""One rank of an engine over Gloo: five steps of a family's model, against one process.

`families_worker.py family layers keywords`: the keywords of `train`, as JSON.
"""

import json
import sys

import autodist_fx as adx
from autodist_fx.runtime.comm.process_group import leave
from tests.support.float64 import in_float64
from tests.support.training.families import task
from tests.support.training.one_process import MAX_NORM, adamw, state_errors, train_in_one_process

family, layers, keywords = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
with in_float64():
    model, steps, count = task(family, layers, 5)
    truth, optimizer, numbers = train_in_one_process(model, steps, count)
    given = {"microbatches": 2, "optimizer": adamw, "max_grad_norm": MAX_NORM, **keywords}
    engine = adx.train(model, device="cpu", timeout=100, **given)
    for window, (loss, norm) in zip(steps, numbers, strict=True):
        result = engine.step(window)
        assert abs(result.loss - loss) <= 1e-9 * abs(loss), (result, loss)
        assert abs(result.grad_norm - norm) <= 1e-9 * norm, (result, norm)
    wrong = {name: e for name, e in state_errors(engine.gather(), truth, optimizer).items() if not e <= 1e-9}
    assert not wrong, wrong
leave()
