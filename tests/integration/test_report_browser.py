"""The report in a real browser, where one is installed: nothing is said on its console, and every section is there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest

from orchestrator.report import html
from orchestrator.report.collect import collect
from orchestrator.store import Store
from tests.grid_store import GridStore
from tests.labs import lab_missing

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
)


@pytest.fixture
def chromium() -> str:
    """The path of a Chromium; where there is none the test is skipped, and fails in CI."""
    if not CHROMIUM:
        lab_missing("browser", "no Chromium here (Debian: bash infra/browser/install.sh)")
    return CHROMIUM


# Opens the report in a frame as wide as a screen, looks at its boxes, and writes what is wrong as JSON.
LOOK = """<!doctype html><title>look</title><iframe id=f width=%d height=900 src="%s"></iframe><pre id=out></pre>
<script>
document.getElementById('f').onload=function(){var d=this.contentDocument,w=this.contentWindow,bad=[];
function all(q,n){return [].slice.call((n||d).querySelectorAll(q))}
all('details').forEach(function(x){x.open=true});
if(d.documentElement.scrollWidth>w.innerWidth+1)bad.push('page wider than the screen: '+
 d.documentElement.scrollWidth+all('body *').filter(function(x){return x.getBoundingClientRect().right>w.innerWidth+1&&
 !(x.parentNode.closest&&x.parentNode.closest('.scroll,.figure,pre'))}).map(function(x){return ' '+x.tagName+
 '.'+x.className}).slice(0,4));
function meet(a,b){return a.left<b.right-1&&b.left<a.right-1&&a.top<b.bottom-1&&b.top<a.bottom-1}
all('svg').forEach(function(s){var v=s.viewBox.baseVal,keys=all('g.key text',s).map(function(k){return k.getBBox()});
 keys=keys.map(function(b){return{left:b.x,right:b.x+b.width,top:b.y,bottom:b.y+b.height}});
 keys.forEach(function(a,i){keys.slice(i+1).forEach(function(b){
  if(meet(a,b))bad.push('legends overlap in '+s.getAttribute('aria-label'))})});
 all('text',s).forEach(function(x){if(x.hasAttribute('transform'))return;var b=x.getBBox();
  if(b.x<-1||b.x+b.width>v.width+1||b.y+b.height>v.height+1||b.y<-1)
   bad.push('cut text: '+x.textContent+' in '+s.getAttribute('aria-label'));
  if(/\\u2026/.test(x.textContent))bad.push('shortened: '+x.textContent+' in '+s.getAttribute('aria-label'))})});
var small=all('.small-multiples svg');if(small.length<2)bad.push('no small plots');
small.forEach(function(s){var t=all('text',s).map(function(x){var b=x.getBBox();
  return{left:b.x,right:b.x+b.width,top:b.y,bottom:b.y+b.height,said:x.textContent}});
 t.forEach(function(a,i){t.slice(i+1).forEach(function(b){
  if(meet(a,b))bad.push('texts overlap: '+a.said+' and '+b.said)})});
 all('circle',s).forEach(function(c){var o=c.getBBox();t.forEach(function(a){
  if(meet(a,{left:o.x,right:o.x+o.width,top:o.y,bottom:o.y+o.height}))bad.push('a point lies on '+a.said)})})});
all('.scroll').forEach(function(b){if(!b.offsetParent)return;var c=w.getComputedStyle(b).overflowX;
 if(b.scrollWidth>b.clientWidth+2&&(c!=='auto'||b.nextSibling.hidden))
  bad.push('columns out of reach, without a sign')});
function light(c){var v=c.match(/[0-9.]+/g).slice(0,3).map(function(x){x/=255;return x<=.03928?x/12.92:
 Math.pow((x+.055)/1.055,2.4)});return .2126*v[0]+.7152*v[1]+.0722*v[2]}
var page=light(w.getComputedStyle(d.body).backgroundColor),dark=w.matchMedia('(prefers-color-scheme: dark)').matches;
all('p,td,th,svg text,a,li').forEach(function(x){if(!x.getClientRects().length||bad.length>5)return;
 var s=w.getComputedStyle(x),t=light(x.closest('svg')?s.fill:s.color),hi=Math.max(t,page),lo=Math.min(t,page);
 if((hi+.05)/(lo+.05)<3)bad.push('hardly readable: '+x.tagName+' '+x.textContent.slice(0,40)+' '+s.color)});
var h=d.querySelector('table.sortable th[data-c="1"]'),col=function(){return all('table.sortable tbody tr').map(
 function(r){return +r.cells[1].getAttribute('data-v')})};
h.click();var up=col();h.click();var down=col();
if(JSON.stringify(up)!==JSON.stringify(down.slice().reverse())||up[0]>up[up.length-1])bad.push('not sorted: '+up);
var i=d.querySelector('input[type=search]');i.value='expert';i.dispatchEvent(new w.Event('input'));
var left=all('table.sortable tbody tr').filter(function(r){return !r.hidden}).length;
if(left!==1)bad.push('the filter leaves '+left+' rows');
var plot=d.querySelector('svg[data-axes]');plot.scrollIntoView();var r=plot.getBoundingClientRect();
plot.dispatchEvent(new w.PointerEvent('pointermove',{bubbles:true,clientX:r.left+r.width/2,clientY:r.top+r.height/3}));
var tip=d.querySelector('.tip');if(tip.hidden||!/:/.test(tip.textContent))bad.push('no value under the pointer');
var line=plot.querySelector('polyline'),before=line.getAttribute('points'),box=plot.parentNode.querySelector('input');
box.click();if(line.getAttribute('points')===before)bad.push('the logarithmic axis changes nothing');
document.getElementById('out').textContent=JSON.stringify({bad:bad,dark:dark&&page<.1,first:d.querySelector('.answer').
 getBoundingClientRect().bottom+w.scrollY})};</script>"""


def shown_by(chromium: str, folder: Path, *words: str) -> tuple[str, str]:
    """Run Chromium; return what it wrote to stdout and stderr."""
    own = (f"--user-data-dir={folder / 'profile'}", "--allow-file-access-from-files", "--virtual-time-budget=8000")
    shown = subprocess.run([chromium, *FLAGS, *own, *words], capture_output=True, text=True, timeout=180, check=True)
    return shown.stdout, shown.stderr


def report(folder: Path) -> Path:
    """Write the report of a grid with long names of settings and probes."""
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    settings = ("none", "router", "expert", "none->router", "a_schedule_with_a_very_long_name_that_fits_nowhere")
    GridStore(store, probes=True, settings=settings, effects={"router": 0.08, "none->router": 0.05}).commit_all()
    return html.write(collect("demo", store), folder / "index.html")


@pytest.mark.parametrize(("width", "height", "dark"), [(390, 844, False), (1440, 900, False), (1440, 900, True)])
def test_on_a_phone_and_a_screen_nothing_is_cut_or_overlaps_and_all_is_in_reach(
    tmp_path: Path, chromium: str, width: int, height: int, dark: bool
) -> None:
    page = report(tmp_path)
    look = tmp_path / "look.html"
    look.write_text(LOOK % (width, page.name), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    out, err = shown_by(chromium, tmp_path, scheme, "--window-size=1600,1000", "--dump-dom", look.as_uri())
    found = json.loads(re.search(r'<pre id="out">(.*?)</pre>', out, re.DOTALL)[1].replace("&gt;", ">"))
    assert found["bad"] == []
    assert found["dark"] == dark
    assert found["first"] <= height, "the first screen answers"
    assert "CONSOLE" not in err


def test_printed_on_a4_every_column_is_there(tmp_path: Path, chromium: str) -> None:
    page = report(tmp_path)
    pdf = tmp_path / "page.pdf"
    _, err = shown_by(chromium, tmp_path, f"--print-to-pdf={pdf}", "--no-pdf-header-footer", page.as_uri())
    assert "CONSOLE" not in err
    assert pdf.read_bytes().startswith(b"%PDF")
    if reader := shutil.which("pdftotext"):
        text = subprocess.run([reader, "-layout", pdf, "-"], capture_output=True, text=True, check=True).stdout
        assert all(word in " ".join(text.split()) for word in ("specialization", "collaboration", "Provenance"))


def test_the_page_opens_without_a_word_on_the_console(tmp_path: Path, chromium: str) -> None:
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    grid = GridStore(store, probes=True)
    grid.commit_all()
    page = html.write(collect("demo", store), tmp_path / "index.html")
    words = [
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={tmp_path / 'page.png'}",
        "--window-size=400,900",
    ]
    shown = subprocess.run(
        [chromium, *FLAGS, *words, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=180, check=True
    )
    assert "CONSOLE" not in shown.stderr
    for section in ("results", "differences", "training", "loads", "routing", "provenance"):
        assert f'<section id="{section}">' in shown.stdout
