"""The trace page as a person meets it, in Debian's Chromium."""

from __future__ import annotations

import re
import time
from contextlib import contextmanager

import httpx
import pytest
from playwright.sync_api import expect

import browsing
import told_spans
from browsing import chromium, png_size, take_picture, trace_page
from told_spans import Exports, trace_id

PATIENCE_MS = 30_000
PICTURE_BYTES = 150_000


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def traces_url(tmp_path):
    with trace_page(tmp_path / "traces.db") as url:
        yield url


@pytest.fixture
def exports(traces_url):
    def send(body):
        headers = {"content-type": "application/x-protobuf"}
        httpx.post(f"{traces_url}/v1/traces", content=body, headers=headers, trust_env=False).raise_for_status()

    return Exports(send)


@pytest.fixture
def opened(browser, traces_url):
    """Opens pages; in the end none of them has logged an error or asked another host for anything."""
    complaints = []

    @contextmanager
    def opened(path, *, width=1280, scheme="light", touch=False):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, has_touch=touch)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda asked: None if asked.url.startswith((traces_url, "data:")) else complaints.append(asked.url),
        )
        try:
            page.goto(traces_url + path)
            yield page
        finally:
            context.close()

    expect.set_options(timeout=PATIENCE_MS)
    yield opened
    assert not complaints


def row(page, name):
    return page.locator(".row").filter(has_text=re.compile(name))


def test_a_search_leads_to_a_trace_and_its_spans(opened, exports, traces_url):
    """Type, open, fold, unfold, open the details, and send somebody the address."""
    root = told_spans.retried_task(exports)
    told_spans.fan_out(Exports(exports.send, seed="another"))
    exports.export()
    with opened("/") as page:
        page.keyboard.press("/")
        page.keyboard.type("retrying")
        page.keyboard.press("Enter")
        page.wait_for_url("**/?q=retrying")
        page.get_by_role("link", name="billing.document.render").click()
        page.wait_for_url(f"**/traces/{trace_id(root)}")

        row(page, "3 attempts").locator(".twisty").click()
        expect(row(page, "Attempt 2")).to_be_hidden()
        expect(row(page, "publish taskmesh.commands")).to_be_visible()
        row(page, "3 attempts").locator(".twisty").click()
        expect(row(page, "Attempt 2")).to_be_visible()

        row(page, "Attempt 2").click()
        expect(page.locator(".inside")).to_contain_text("billing_worker.errors.StoreUnavailable")
        address = page.url
        page.goto(traces_url)
        page.goto(address)
        expect(page.locator(".inside")).to_contain_text("billing_worker.errors.StoreUnavailable")


def test_the_filters_make_an_address_that_can_be_shared(opened, exports):
    """Only what is filled in stands in it; each condition can be taken away."""
    told_spans.retried_task(exports)
    told_spans.fan_out(Exports(exports.send, seed="another"))
    exports.export()
    with opened("/") as page:
        page.get_by_text("Filters").click()
        page.get_by_label("Service").select_option("billing-worker")
        page.get_by_label("Duration at least").fill("1s")
        page.get_by_label("With errors").check()
        page.locator(".checks button").click()
        page.wait_for_url("**/?*")

        assert set(page.url.partition("?")[2].split("&")) == {"service=billing-worker", "min=1s", "errors=true"}
        expect(page.get_by_text("1 trace", exact=True)).to_be_visible()

        page.get_by_role("link", name="Remove the condition With errors").click()
        page.wait_for_url("**/?service=billing-worker&min=1s")
        expect(page.get_by_label("Duration at least")).to_have_value("1s")


def test_linked_traces_are_followed_in_both_directions(opened, exports):
    """From the request to the trace in which its task ran, and back; from a span to a batch, and back."""
    server, run = told_spans.scheduled_task(exports)
    told_spans.batches_of(exports, server)
    exports.export()
    with opened(f"/traces/{trace_id(server)}") as page:
        page.get_by_role("link", name="Ran later as").click()
        page.wait_for_url(f"**/traces/{trace_id(run)}")
        page.get_by_role("link", name="Scheduled by").click()
        page.wait_for_url(f"**/traces/{trace_id(server)}")

        row(page, "POST /v1/tasks").click()
        page.get_by_role("link", name="2 batches link to this span").click()
        page.get_by_role("link", name="publish taskmesh.lifecycle").click()
        page.get_by_role("link", name="Carried a message of").click()
        page.wait_for_url(f"**/traces/{trace_id(server)}")


def test_a_task_is_copied_for_the_command_line(opened, exports):
    """Its id, and the command that explains it, from the page of a trace and from that of a span."""
    root = told_spans.retried_task(exports)
    exports.export()
    task = exports.task_id("retried")
    with opened(f"/traces/{trace_id(root)}") as page:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.get_by_role("button", name="Copy the command that explains the task").click()
        expect(page.get_by_text("Copied")).to_be_visible()
        assert page.evaluate("navigator.clipboard.readText()") == f"taskmesh explain {task}"

        row(page, "Attempt 2").click()
        page.get_by_role("link", name="Open alone").click()
        page.wait_for_url("**/spans/*")
        page.get_by_role("button", name="Copy the task's id").click()
        expect(page.get_by_text("Copied")).to_be_visible()
        assert page.evaluate("navigator.clipboard.readText()") == task


def test_a_phone_scrolls_in_one_direction_only(opened, exports):
    """375 points are enough for the list, its filters, a waterfall and the details of a span."""
    root = told_spans.retried_task(exports)
    told_spans.batches_of(exports, root)
    exports.export()
    with opened("/?background=true&min=1ms", width=375, touch=True) as page:
        assert page.evaluate(OVERFLOW) == []
        page.get_by_role("link", name="billing.document.render").tap()
        row(page, "Attempt 2").tap()
        expect(page.locator(".inside .facts").first).to_be_visible()
        assert page.evaluate(OVERFLOW) == []
        lane, whole = row(page, "Attempt 2").locator(".lane").bounding_box(), page.viewport_size["width"]
        assert lane["width"] > 0.8 * whole


# What is wider than the window, or than its own box without being cut off on purpose.
OVERFLOW = """() => [
  ...(document.documentElement.scrollWidth > innerWidth ? ["the page"] : []),
  ...[...document.querySelectorAll("main *")].filter((each) => !each.closest("svg, .visually-hidden")
      && (each.getBoundingClientRect().right > innerWidth + 1
        || (each.clientWidth && each.scrollWidth > each.clientWidth + 1 && getComputedStyle(each).overflowX === "visible")))
    .map((each) => each.outerHTML.slice(0, 120)),
]"""


def test_the_keyboard_reaches_everything(opened, exports):
    """Rows by arrows, folding, details, zoom, and out again, with the focus where it was."""
    root = told_spans.retried_task(exports)
    exports.export()
    with opened(f"/traces/{trace_id(root)}") as page:
        tree = page.get_by_role("treegrid")
        page.locator("#unfold").focus()
        page.keyboard.press("Tab")
        expect(row(page, "POST /v1/tasks")).to_be_focused()

        for _ in range(4):
            page.keyboard.press("ArrowDown")
        expect(row(page, "Attempt 1")).to_be_focused()
        page.keyboard.press("ArrowLeft")
        expect(row(page, "Attempt 1")).to_have_attribute("aria-expanded", "false")
        page.keyboard.press("ArrowLeft")
        expect(row(page, "3 attempts")).to_be_focused()
        page.keyboard.press("ArrowLeft")
        expect(row(page, "Attempt 1")).to_be_hidden()
        page.keyboard.press("ArrowRight")
        expect(row(page, "Attempt 2")).to_be_visible()
        # What was folded inside is folded still.
        expect(row(page, "render document").first).to_be_hidden()

        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        inside = tree.locator(".inside")
        expect(inside).to_contain_text("taskmesh.task.attempt")
        page.keyboard.press("Tab")
        expect(inside.get_by_role("button", name="Copy the task's id")).to_be_focused()
        page.keyboard.press("Escape")
        expect(inside).to_have_count(0)
        expect(row(page, "Attempt 1")).to_be_focused()

        page.keyboard.press("End")
        expect(row(page, "publish taskmesh.direct").last).to_be_focused()
        page.keyboard.press("z")
        expect(page.get_by_role("button", name="Whole trace")).to_be_visible()
        assert float(row(page, "publish taskmesh.direct").last.locator("rect").get_attribute("width").rstrip("%")) > 80
        page.keyboard.press("Escape")
        expect(page.get_by_role("button", name="Whole trace")).to_be_hidden()


def test_a_trace_of_a_thousand_spans_is_shown_scrolled_and_folded_at_once(opened, exports):
    """By the time that the browser computes, which does not depend on what else the machine does; generously."""
    root = told_spans.large(exports)
    exports.export()
    with opened("/") as page:
        clock = computing(page)
        page.goto(page.url + f"traces/{trace_id(root)}")
        assert page.locator(".row").count() == 1000
        shown = clock()

        page.evaluate(SCROLL)
        scrolled = clock()

        page.get_by_role("button", name="Fold all", exact=True).click()
        expect(row(page, "smtp send").first).to_be_hidden()
        assert page.locator(".row:not([hidden])").count() == 334
        folded = clock()

    # Measured: 0.1, 0.4 and 0.1 seconds.
    assert shown < 2
    assert scrolled < 4
    assert folded < 2


# From the top to the bottom, and at each step until the browser has drawn.
SCROLL = """async () => {
  for (let y = 0; y < document.documentElement.scrollHeight; y += 1600) {
    scrollTo(0, y);
    await new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)));
  }
}"""


def computing(page):
    """A clock: how many seconds the page's own thread has computed since it was last asked."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    before = 0.0

    def clock():
        nonlocal before
        metrics = {each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]}
        passed, before = metrics["ThreadTime"] - before, metrics["ThreadTime"]
        return passed

    return clock


def test_new_traces_come_while_somebody_looks(opened, exports):
    """Without a reload, and without taking the focus from where the keyboard is."""
    told_spans.retried_task(exports)
    exports.export()
    with opened("/") as page:
        link = page.get_by_role("link", name="billing.document.render")
        link.focus()
        told_spans.fan_out(exports)
        exports.export()

        expect(page.get_by_role("link", name="billing.invoice.issue")).to_be_visible()
        expect(link).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_by_day_and_by_night(opened, exports, scheme):
    """Contrast of at least 4.5 to 1 (WCAG 2.2, AA)."""
    root = told_spans.retried_task(exports)
    told_spans.scheduled_task(exports)
    exports.export()
    with opened("/?errors=true", scheme=scheme) as page:
        assert page.evaluate(PALE) == []
        page.get_by_role("link", name="billing.document.render").click()
        row(page, "Attempt 2").click()
        expect(page.locator(".inside .facts").first).to_be_visible()
        page.wait_for_url(f"**/traces/{trace_id(root)}#*")
        assert page.evaluate(PALE) == []


# Texts whose colour is too near to what is behind them. A canvas reads every notation of a colour.
PALE = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const behind = (element) => {
    const layers = [];
    for (let each = element; each; each = each.parentElement) layers.push(rgba(getComputedStyle(each).backgroundColor));
    return layers.reverse().reduce((under, [r, g, b, a]) => [r, g, b].map((c, i) => c * a / 255 + under[i] * (1 - a / 255)), [255, 255, 255]);
  };
  const light = (color) => color.slice(0, 3).map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const texts = [...document.querySelectorAll("body *")].filter((each) => !each.closest("svg, datalist")
    && [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) && each.checkVisibility());
  return texts.map((each) => [each.outerHTML.slice(0, 90), contrast(rgba(getComputedStyle(each).color), behind(each))])
    .filter(([, value]) => value < 4.5);
}"""


def test_a_machine_without_the_browser_skips_unless_it_is_that_of_ci(monkeypatch, tmp_path):
    """What nobody has installed is no fault of the code; in CI it would go unnoticed."""
    monkeypatch.setattr(browsing, "CHROMIUM", tmp_path / "chromium")

    monkeypatch.delenv(browsing.CI_VARIABLE, raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install"), chromium():
        pass
    monkeypatch.setenv(browsing.CI_VARIABLE, "1")
    with pytest.raises(pytest.fail.Exception, match="apt-get install"), chromium():
        pass


def test_a_picture_of_a_waterfall_is_small_and_shows_waits_and_attempts(
    browser, traces_url, exports, opened, tmp_path, monkeypatch
):
    """Small, of a known width, the same each time, and with everything that they are there to show."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    stories = {"trace-retried": told_spans.retried_task, "trace-fan-out": told_spans.fan_out}
    try:
        for name, tell in stories.items():
            told = Exports(exports.send, seed=name)
            root = tell(told)
            told.export()
            file = tmp_path / f"{name}.png"

            take_picture(browser, traces_url, trace_id(root), file)

            width, height = png_size(file)
            assert width == browsing.WIDTH
            assert 600 < height < 1100
            assert file.stat().st_size < PICTURE_BYTES
            with opened(f"/traces/{trace_id(root)}") as page:
                drawn = {
                    wait for wait in ("outbox", "broker", "prefetch", "retry") if page.locator(f".lane .{wait}").count()
                }
                pins = page.locator(".pin").all_text_contents()
            assert drawn == {"outbox", "broker", "prefetch"} | ({"retry"} if name == "trace-retried" else set())
            assert [each.strip() for each in pins] == (["1", "2", "3"] if name == "trace-retried" else [])
    finally:
        monkeypatch.undo()
        time.tzset()
