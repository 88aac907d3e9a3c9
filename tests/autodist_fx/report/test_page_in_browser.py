"""The page of a plan in a real browser, headless Chromium: nothing overlaps, no errors, no network, tables work."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from itertools import pairwise
from pathlib import Path

import pytest

from autodist_fx.report.page import plan_page
from cost_model.graph.placement import Layout
from tests.support.plans.examples import large_plan, small_plan
from tests.support.plans.hostile import hostile_plan

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: `make setup` as root on Debian installs it")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
CATCH = "<script>window.pageErrors = []; addEventListener('error', (e) => pageErrors.push(e.message));</script>"
SEARCHES = ["mlp", "layers.3.mlp", "layers.99.mlp", "ROW", "up_proj 1536x576", "vocab lm_head", "no such thing"]


def rendered(page, tmp_path, width=1400, dark=False):
    """The document as it is once the page has loaded."""
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    size = f"--window-size={width},3000"
    command = [CHROMIUM, *FLAGS, *scheme, size, f"--user-data-dir={tmp_path}/profile", "--dump-dom", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def look_at(page, tmp_path, **options):
    """Returns what page_checks.js finds on a page."""
    script = Path(__file__).with_name("page_checks.js").read_text(encoding="utf-8")
    # The page's policy lets no script but its own run; that it does is the last test's matter.
    page, n = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', CATCH, page)
    assert n == 1
    checks = f"<script>const SEARCHES = {json.dumps(SEARCHES)};\n{script}</script></body>"
    document = rendered(page.replace("</body>", checks), tmp_path, **options)
    match = re.search(r'<pre id="found">(.*?)</pre>', document, re.S)
    assert match, "the checks did not run to their end"
    return json.loads(unescape(match[1]))


def assert_sound(found):
    assert found["errors"] == []
    assert found["texts"] > 100
    assert found["overlaps"] == []
    assert found["spills"] == []
    assert found["outside"] == []
    assert found["scrolls"] <= 0
    assert found["unreachable"] == 0
    assert found["requests"] == []


def varied_plan():
    """8 x 4 ranks of 80 layers, with a fused weight, KV heads that several ranks hold, uneven heads and a replica."""
    plan = large_plan(400)
    tp = plan.mesh.tp
    fused = Layout(576, tuple(tuple((192 * third + 24 * r, 192 * third + 24 * r + 24) for third in range(3))
                              for r in range(tp)))  # fmt: skip
    shared = Layout(576, tuple(((144 * (r // 2), 144 * (r // 2 + 1)),) for r in range(tp)))
    ends = [1536 * r * r // tp**2 for r in range(tp + 1)]
    uneven = Layout(1536, tuple((interval,) for interval in pairwise(ends)))
    layouts = (*plan.layouts, fused, shared, uneven)
    new = {"self_attn.q_proj": len(plan.layouts), "self_attn.o_proj": len(plan.layouts) + 1,
           "mlp.up_proj": len(plan.layouts) + 2}  # fmt: skip

    def changed(param):
        index = next((i for key, i in new.items() if key in param.name), None)
        return param if index is None else replace(param, layout=index)

    return replace(plan, layouts=layouts, params=tuple(map(changed, plan.params)))


@pytest.mark.drawn(1)
@pytest.mark.parametrize("width, dark", [(1400, False), (700, True)])
def test_readable_at_8_x_4_ranks(tmp_path, width, dark):
    assert_sound(look_at(plan_page(varied_plan()), tmp_path, width=width, dark=dark))


def test_the_checks_see_a_page_that_is_broken(tmp_path):
    style = ".facts dd { margin-left: -5rem; } .badge { width: 1rem; } .lane i { margin-left: 2rem; }"
    page = plan_page(small_plan()).replace("</style>", style + "body { width: 2000px; }</style>")
    more = '<script>nothing();</script><img src="http://127.0.0.1:9/x.png"></main>'
    found = look_at(page.replace("</main>", more), tmp_path)
    assert found["errors"] == ["Uncaught ReferenceError: nothing is not defined"]
    assert all(found[key] for key in ("overlaps", "spills", "outside", "requests")) and found["scrolls"] > 0


def test_tables_are_searched_and_sorted(tmp_path):
    found = look_at(plan_page(small_plan()), tmp_path, width=1000)
    assert_sound(found)
    layer = "model.layers.*."
    linears = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
    everything = ["model.embed_tokens", *(layer + linear for linear in linears), "lm_head"]
    mlp = [layer + "mlp.up_proj", layer + "mlp.down_proj"]
    assert found["searches"] == {
        "": everything,
        "mlp": mlp,
        "layers.3.mlp": mlp,
        "layers.99.mlp": [],
        "ROW": [layer + "self_attn.o_proj", layer + "mlp.down_proj"],
        "up_proj 1536x576": [layer + "mlp.up_proj"],
        "vocab lm_head": ["lm_head"],
        "no such thing": [],
    }
    assert found["focused"]
    up, down, plain = found["sorted"]["Module"]
    assert (up[0], down[0], plain[0]) == ("ascending", "descending", None)
    assert up[1] == sorted(everything) and down[1] == sorted(everything, reverse=True) and plain[1] == everything
    up, down, _ = found["sorted"]["All layers"]
    nbytes = [int(n) for n in up[2]]
    assert nbytes == sorted(nbytes) == sorted(map(int, down[2])) and nbytes[0] < nbytes[-1]


def test_a_page_of_hostile_names_runs_its_own_script_and_no_other(tmp_path):
    document = rendered(plan_page(hostile_plan()), tmp_path)
    assert re.search("<title>LlamaForCausalLM&lt;/script&gt;", document)  # which an attack would have changed
    assert "<img" not in document
    assert re.search(r'<p class="search">', document)  # no longer hidden: the script ran under the page's policy


def test_a_page_of_hostile_names_is_laid_out_all_the_same(tmp_path):
    found = look_at(plan_page(hostile_plan()), tmp_path)
    assert found["errors"] == [] and found["requests"] == [] and found["scrolls"] <= 0
    assert found["overlaps"] == []
