"""The HTML report: what is in the file, and what a real browser makes of it."""

import base64
import hashlib
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

import train
from captioner import cli, report
from captioner.errors import UserError
from captioner.report import Decoded, Item, write_report
from tests.headless_browser import PROGRAMS, Browser, find_program

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    "<!-- <script> \" ' ` ${window.hacked = 3} &lt;b&gt; &amp; \\u003c \\",
    "a \u202eright to left\u202c \u2028 line \u2029 end \U0001f436",
    "שלום כלב, 犬 \U0001f415",
]


def picture(seed: int = 0, size: tuple[int, int] = (200, 120)) -> Image.Image:
    """Blurred noise with grain, about as hard to compress as a photograph."""
    rng = np.random.default_rng(seed)
    blurred = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return Image.fromarray(np.clip(np.asarray(blurred) + rng.normal(0, 16, (size[1], size[0], 3)), 0, 255).astype(np.uint8))


def data_text(path) -> str:
    """The data block of a report, found as a browser finds it: up to the first end of a script."""
    return path.read_text(encoding="utf-8").split('<script type="application/json" id="data">')[1].split("</script>")[0]


def data_of(path) -> dict:
    return json.loads(data_text(path))


def image_of(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


@pytest.fixture
def plot(tmp_path):
    Image.new("RGB", (30, 20), "white").save(tmp_path / "loss.png")
    return tmp_path / "loss.png"


def test_the_data_is_whole_and_escaped(tmp_path, plot):
    items = [Item(text, picture(), [text], [Decoded(text, text, {"CIDEr": 0.25, text: 1.0, "Bleu_4": float("nan")})]) for text in HOSTILE]
    table = [{"name": HOSTILE[0], "CIDEr": 0.12345, "CLIPScore": 0.7, "n": 1234, "length": 10.5, "none": float("nan")}]
    write_report(tmp_path / "out" / "report.html", HOSTILE[0], {HOSTILE[0]: HOSTILE[1]}, table, items, {HOSTILE[1]: plot})
    text = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    data = data_of(tmp_path / "out/report.html")
    assert data["title"] == HOSTILE[0] and data["facts"] == [[HOSTILE[0], HOSTILE[1]]]
    for item, expected in zip(data["items"], HOSTILE, strict=True):
        assert item["id"] == item["references"][0] == item["decoded"][0]["caption"] == expected
        assert item["decoded"][0]["scores"] == {"CIDEr": 0.25, expected: 1.0}, "scores that are not finite are left out"
    assert [cell[0] for cell in data["table"]["rows"][0]] == [HOSTILE[0], "0.123", "0.700", "1,234", "10.50", "–"]
    assert text.count("<script") == 2 and text.count("</script>") == 2
    block = data_text(tmp_path / "out/report.html")
    assert block.isascii() and not set("<>&") & set(block)


def test_nothing_outside_the_file_is_named(tmp_path, plot):
    write_report(tmp_path / "report.html", "t", {}, [], [Item("a", picture(), [], [])], {"Training": plot})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "://" not in text and "url(" not in text and "@import" not in text
    assert all(target.startswith("data:") for target in re.findall(r"(?:src|href)=[\"']([^\"']*)", text))
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    script = text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:") and f"script-src 'sha256-{digest}'" in policy


def test_lone_surrogates_from_file_names_are_kept(tmp_path):
    write_report(tmp_path / "report.html", "t", {}, [], [Item("a\udcff.png", None, [], [])], {})
    assert data_of(tmp_path / "report.html")["items"][0] == {"id": "a\udcff.png", "references": [], "decoded": []}


def test_thumbnails_are_small_and_carry_only_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x8825] = {1: "N", 2: (48.0, 12.0, 0.0)}
    source = io.BytesIO()
    picture(size=(400, 300)).save(source, "JPEG", exif=exif, icc_profile=b"profile", comment=b"a comment")
    opened = Image.open(source)
    assert opened.getexif() and opened.info["icc_profile"]
    uri = report.thumbnail(opened)
    small = image_of(uri)
    assert small.size == (160, 120) and small.format == "WEBP"
    assert not dict(small.getexif()) and not {"icc_profile", "exif", "xmp", "comment"} & set(small.info)
    assert image_of(report.thumbnail(Image.new("L", (10, 3)))).size == (10, 3), "nothing is enlarged"
    assert image_of(report.thumbnail(Image.new("RGB", (1, 2000)))).size == (1, 160)


def test_maps_are_one_byte_a_cell(tmp_path):
    maps = np.array([[[0.0, 0.5], [1.0, 0.25]], [[0.2, 0.2], [0.2, 0.2]]])
    decoded = Decoded("beam", "a dog", {}, ["a", "dog"], maps)
    write_report(tmp_path / "report.html", "t", {}, [], [Item("a", picture(), [], [decoded], (0.25, 0, 0.75, 1))], {})
    [item] = data_of(tmp_path / "report.html")["items"]
    [saved] = item["decoded"]
    assert saved["words"] == ["a", "dog"] and saved["grid"] == [2, 2] and saved["peaks"] == [2.3, 1.0]
    assert list(base64.b64decode(saved["maps"])) == [0, 128, 255, 64, 0, 0, 0, 0]
    assert item["seen"] == [0.25, 0, 0.75, 1]


def test_maps_that_do_not_fit_are_named(tmp_path):
    for shape in ((3, 2, 2), (2, 4)):
        decoded = Decoded("beam", "a dog", {}, ["a", "dog"], np.ones(shape))
        with pytest.raises(UserError, match="'a dog'.* 2 words"):
            write_report(tmp_path / "report.html", "t", {}, [], [Item("a", None, [], [decoded])], {})


def test_self_scored_cells_are_marked(tmp_path):
    rows = [
        {"name": "beam", "CIDEr": 1.0, "CLIPScore": 0.5, "CLIPScore (other)": 0.5},
        {"name": "best_of_n", "CIDEr": 1.0, "CLIPScore": 0.5, "CLIPScore (other)": 0.5, "self_scored": ["CLIPScore"]},
        {"name": "oracle", "CIDEr": 1.0, "CLIPScore": 0.5, "CLIPScore (other)": 0.5, "self_scored": ("CLIPScore", "CLIPScore (other)")},
    ]
    write_report(tmp_path / "report.html", "t", {}, rows, [], {})
    table = data_of(tmp_path / "report.html")["table"]
    assert table["columns"] == ["name", "CIDEr", "CLIPScore", "CLIPScore (other)"]
    assert [[cell[2] for cell in row] for row in table["rows"]] == [[False] * 4, [False, False, True, False], [False, False, True, True]]


def test_a_thousand_images_take_less_than_15_megabytes(tmp_path):
    assert len(report.thumbnail(picture(size=(224, 224)))) > 5000, "as big as that of a photograph"
    rng = np.random.default_rng(0)
    caption = "a brown dog with a red collar runs over the green lawn behind a white house and a small blue fence"

    def items():
        for index in range(200):
            scores = {"CIDEr": rng.random(), "Bleu_4": rng.random(), "CLIPScore": rng.random(), "RefCLIPScore": rng.random()}
            maps = rng.random((20, 14, 14))
            decoded = [Decoded(name, caption, scores) for name in ("greedy", "beam")]
            decoded.append(Decoded("best_of_n", caption, scores, caption.split()[:20], maps))
            yield Item(f"image-{index:012d}.jpg", picture(index, (224, 224)), [caption[:60]] * 5, decoded)

    write_report(tmp_path / "report.html", "t", {}, [], items(), {})
    assert (tmp_path / "report.html").stat().st_size < 15e6 / 5


def test_a_report_that_fails_leaves_the_old_one(tmp_path):
    write_report(tmp_path / "report.html", "old", {}, [], [], {})
    with pytest.raises(UserError, match="none.png"):
        write_report(tmp_path / "report.html", "new", {}, [], [], {"Training": tmp_path / "none.png"})
    assert data_of(tmp_path / "report.html")["title"] == "old" and len(list(tmp_path.iterdir())) == 1


def test_the_loss_curve_is_a_plot_where_there_is_one(tmp_path, plot):
    assert report.training_plot(tmp_path) == {"Training": plot}
    assert report.training_plot(tmp_path / "elsewhere") == {}


def run_training(flags) -> int:
    with pytest.raises(SystemExit) as exit_info:
        cli.run_command(train.main, flags)
    return exit_info.value.code


def test_training_writes_what_every_evaluation_said(tiny_flags, tiny_data, tmp_path):
    assert run_training([*tiny_flags, "--eval-every", "2"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    said = {line["step"]: {row["id"]: row["caption"] for row in line["captions"]} for line in lines if line["split"] == "val"}
    assert list(said) == [0, 2, 4]
    data = data_of(tmp_path / "run/report.html")
    assert [row[0][0] for row in data["table"]["rows"]] == ["0", "2", "4"] and len(data["plots"]) == 1
    assert image_of(data["plots"][0]["image"]).format == "PNG"
    assert [item["id"] for item in data["items"]] == ["red.png", "green.png", "blue.png", "yellow.png"]
    for item in data["items"]:
        expected = [(f"step {step}", captions[item["id"]]) for step, captions in said.items()]
        assert [(one["name"], one["caption"]) for one in item["decoded"]] == expected
        assert len(item["references"]) == 2 and image_of(item["image"]).size == (40, 30)
    facts = dict(data["facts"])
    assert facts["image encoder"] == "ViT-Tiny-Scenes" and facts["LoRA"] == "rank 8 on attn, ffn of decoder" and str(tmp_path) not in json.dumps(facts)


def test_a_training_report_without_its_pictures(tiny_flags, tiny_data, tmp_path):
    assert run_training(tiny_flags) == 0
    from data.readers import read

    rows = read(str(tiny_data), "val")
    (tiny_data / "val" / "red.png").unlink()
    report.write_training_report(tmp_path / "run", {}, rows[:2])
    items = data_of(tmp_path / "run/report.html")["items"]
    assert [(item["id"], "image" in item) for item in items] == [("red.png", False), ("green.png", True)]


# What follows runs in a browser.

LISTEN = """
window.violations = [];
addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""
HELPERS = """
const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const ids = () => all(".card h3").map((node) => node.textContent);
const set = async (id, value) => {
  byId(id).value = value;
  byId(id).dispatchEvent(new Event(id === "search" ? "input" : "change"));
  await pause(150);
};
const optionOf = (id, label) => [...byId(id).options].find((option) => option.textContent.startsWith(label)).value;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A function (report, body of an async script) → what the script put into `result`, with `fetched` URLs and `violations` of the policy."""
    program = find_program()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(PROGRAMS)} is installed")
    running = Browser(program, tmp_path_factory.mktemp("profile"))

    def probe(path, body: str, dark: bool = False) -> dict:
        result, fetched = running.run(path, f"{HELPERS} {body} result.violations = violations;", LISTEN, dark)
        return result | {"fetched": fetched}

    yield probe
    running.close()


@pytest.fixture
def gallery(tmp_path, plot):
    """Ten images with two decodings: beam's CIDEr falls with the index, greedy says "a dog" six times and "a cat" twice."""
    maps = np.zeros((2, 3, 3), dtype=np.float32)
    maps[0, 0, 2] = maps[1, 2, 0] = 1
    items = []
    for index in range(10):
        greedy = "a dog" if index < 6 else "a cat" if index < 8 else f"number {index}"
        beam = Decoded("beam", f"caption {index}", {"CIDEr": 1 - index / 10} if index else {}, ["caption", str(index)], maps)
        decoded = [beam, Decoded("greedy", greedy, {"CIDEr": index / 10, "hallucination": index / 20})]
        items.append(Item(f"id{index}", picture(index), [f"reference {index}"], decoded, (0.25, 0, 0.75, 1)))
    table = [{"name": "beam", "CIDEr": 0.5, "CLIPScore": 0.7, "self_scored": ["CLIPScore"]}, {"name": "greedy", "CIDEr": 0.4, "CLIPScore": 0.6}]
    write_report(tmp_path / "report.html", "A gallery", {"images": "10"}, table, items, {"Training": plot})
    return tmp_path / "report.html"


def test_the_browser_shows_everything_and_fetches_nothing(browser, gallery):
    result = browser(gallery, """
        await Promise.all(all("img").map((image) => image.decode()));
        result.pictures = all(".card img").map((image) => image.naturalWidth);
        result.plots = all(".plot img").map((image) => image.naturalWidth);
        result.texts = ["h1", "#facts", "thead", "tbody tr:first-child", "#status"].map((selector) => document.querySelector(selector).textContent);
        result.badges = all(".badge").map((badge) => badge.parentNode.textContent);
        result.title = document.title;
        result.unnamed = all("button, select, input").filter((node) => !node.textContent.trim() && !node.labels?.length).length;
    """)  # fmt: skip
    assert result["pictures"] == [160] * 10 and result["plots"] == [30]
    assert result["texts"] == ["A gallery", "images10", "nameCIDErCLIPScore", "beam0.500self-scored 0.700", "10 images"]
    assert result["badges"] == ["self-scored 0.700"] and result["title"] == "A gallery"
    assert result["fetched"] == [] and result["violations"] == [] and result["unnamed"] == 0


def test_the_browser_sorts(browser, gallery):
    result = browser(gallery, """
        result.start = [byId("sort").selectedOptions[0].textContent, ids()];
        await set("direction", "-1");
        result.best = ids();
        await set("sort", optionOf("sort", "hallucination, greedy"));
        result.least = ids();
        await set("direction", "1");
        result.most = ids();
        result.marked = all(".sorted", document.querySelector(".card")).map((node) => node.textContent);
        await set("sort", optionOf("sort", "id"));
        result.id = [ids(), byId("direction").selectedOptions[0].textContent];
    """)  # fmt: skip
    up, down = [f"id{index}" for index in range(10)], [f"id{index}" for index in reversed(range(10))]
    assert result["start"] == ["CIDEr, beam", [*down[:9], "id0"]], "worst first, the one without a score last"
    assert result["best"] == [*up[1:], "id0"]
    assert result["least"] == up and result["most"] == down, "the worst hallucination is the greatest"
    assert result["marked"] == ["hallucination 0.450"]
    assert result["id"] == [up, "A to Z"]


def test_the_browser_searches_and_groups_duplicates(browser, gallery):
    result = browser(gallery, """
        await set("search", "REFERENCE 7");
        result.reference = [ids(), byId("status").textContent];
        await set("search", "id3");
        result.id = ids();
        await set("search", "a cat");
        result.caption = ids();
        await set("search", "nothing like it");
        result.none = [ids(), byId("status").textContent];
        await set("search", "");
        result.offered = [...byId("shared").options].map((option) => option.textContent);
        await set("shared", optionOf("shared", "duplicates of greedy"));
        result.groups = all("#gallery > *").map((node) => (node.matches(".card") ? node.querySelector("h3") : node).textContent);
        result.status = byId("status").textContent;
        await set("search", "id7");
        result.both = all("#gallery > *").map((node) => (node.matches(".card") ? node.querySelector("h3") : node).textContent);
    """)  # fmt: skip
    assert result["reference"] == [["id7"], "1 image of 10"] and result["id"] == ["id3"] and result["caption"] == ["id7", "id6"]
    assert result["none"] == [[], "0 images of 10"]
    assert result["offered"] == ["all images", "duplicates of greedy: 2 captions, 8 images"]
    assert result["groups"] == ["a dog  · 6 images", "id5", "id4", "id3", "id2", "id1", "id0", "a cat  · 2 images", "id7", "id6"]
    assert result["status"] == "8 images (80.0 %) with a caption that another image also got"
    assert result["both"] == ["a cat  · 2 images", "id7"]


def test_the_browser_lays_the_map_of_a_word_over_the_picture(browser, gallery):
    result = browser(gallery, """
        const card = document.querySelector(".card"), caption = card.querySelector("button.caption"), picture = card.querySelector(".picture");
        const canvas = card.querySelector("canvas");
        const hot = () => {
          const alpha = [...canvas.getContext("2d").getImageData(0, 0, 3, 3).data].filter((_, index) => index % 4 === 3);
          const shown = all(".shown", card).map((node) => node.textContent);
          return [picture.matches(".mapped"), alpha.indexOf(Math.max(...alpha)), card.querySelector(".note").textContent, shown];
        };
        result.before = [all(".words").length, picture.matches(".mapped"), caption.getAttribute("aria-expanded")];
        caption.click();
        const words = all(".words button", card);
        result.words = words.map((node) => node.textContent);
        result.expanded = caption.getAttribute("aria-expanded");
        words[0].dispatchEvent(new PointerEvent("pointerenter"));
        result.first = hot();
        words[1].focus();
        result.focused = hot();
        words[1].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft", bubbles: true }));
        result.arrow = hot();
        const whole = picture.getBoundingClientRect(), part = canvas.getBoundingClientRect();
        result.box = [(part.left - whole.left) / whole.width, part.top - whole.top, part.width / whole.width, part.height / whole.height];
        words[0].blur();
        result.left = picture.matches(".mapped");
        caption.click();
        result.closed = [all(".words").length, caption.getAttribute("aria-expanded")];
    """)  # fmt: skip
    assert result["before"] == [0, False, "false"] and result["words"] == ["caption", "9"] and result["expanded"] == "true"
    assert result["first"] == [True, 2, "caption: strongest at 9 × the mean", ["caption"]]
    assert result["focused"] == [True, 6, "9: strongest at 9 × the mean", ["9"]]
    assert result["arrow"][1] == 2
    assert result["box"] == pytest.approx([0.25, 0, 0.5, 1], abs=0.01)
    assert result["left"] is False and result["closed"] == [0, "false"]


def test_the_browser_switches_between_light_and_dark(browser, gallery):
    result = browser(gallery, """
        const label = () => byId("theme").getAttribute("aria-label");
        const shown = () => [document.documentElement.dataset.theme, getComputedStyle(document.body).backgroundColor, label()];
        result.start = shown();
        byId("theme").click();
        result.switched = shown();
        byId("theme").click();
        result.again = shown();
    """)  # fmt: skip
    assert result["start"] == ["light", "rgb(247, 247, 245)", "Use dark colours"]
    assert result["switched"] == ["dark", "rgb(20, 21, 23)", "Use light colours"]
    assert result["again"] == result["start"]
    dark = browser(gallery, """
        result.start = document.documentElement.dataset.theme;
        byId("theme").click();
        result.switched = document.documentElement.dataset.theme;
    """, dark=True)  # fmt: skip
    assert (dark["start"], dark["switched"]) == ("dark", "light")


def test_hostile_captions_are_text_in_the_browser(browser, tmp_path, plot):
    maps = np.ones((1, 2, 2))
    items = [Item(text, picture(), [text], [Decoded(text, text, {text: 0.5}, [text], maps), Decoded("greedy", text)]) for text in HOSTILE]
    table = [{text: text for text in HOSTILE}]
    write_report(tmp_path / "report.html", HOSTILE[0], {HOSTILE[0]: HOSTILE[1]}, table, [*items, *items], {HOSTILE[0]: plot})
    result = browser(tmp_path / "report.html", """
        await set("sort", "0");
        const half = all(".card").slice(0, 5);
        for (const card of half) { card.querySelector("button.caption").click(); card.querySelector(".words button").focus(); }
        const places = ["h3", ".references li", "button.caption", ".words button", "p.caption"];
        result.shown = half.map((card) => places.map((place) => card.querySelector(place).textContent));
        await set("shared", optionOf("shared", "duplicates of greedy"));
        result.groups = all("#gallery > h3").map((node) => node.firstChild.textContent);
        result.hacked = window.hacked ?? null;
        result.scripts = all("script").length;
        result.others = all("body img").filter((node) => !node.src.startsWith("data:")).length;
        result.title = document.title;
    """)  # fmt: skip
    assert result["shown"] == [[text] * 5 for text in HOSTILE]
    assert sorted(result["groups"]) == sorted(HOSTILE) and result["title"] == HOSTILE[0].strip()
    assert result["hacked"] is None and result["scripts"] == 2 and result["others"] == 0
    assert result["fetched"] == [] and result["violations"] == []


def test_the_policy_stops_what_text_alone_would_not(browser, gallery):
    result = browser(gallery, """
        const place = make("div");
        document.body.append(place);
        place["inner" + "HTML"] = "<img src='https://example.invalid/a.png'><img src='data:,' onerror='window.hacked = 1'>";
        await fetch("https://example.invalid/").catch(() => (result.refused = true));
        await pause(300);
        result.hacked = window.hacked ?? null;
    """)  # fmt: skip
    assert result["refused"] and result["hacked"] is None
    assert {"img-src", "script-src-attr", "connect-src"} <= set(result["violations"])


def test_the_browser_draws_thousands_of_cards_as_it_scrolls(browser, tmp_path):
    items = (Item(f"id{index}", None, ["a reference"], [Decoded("beam", f"caption {index}", {"CIDEr": index / 3000})]) for index in range(3000))
    write_report(tmp_path / "report.html", "t", {}, [], items, {})
    result = browser(tmp_path / "report.html", """
        result.start = ids().length;
        for (let waited = 0; waited < 100 && ids().length === result.start; waited++) {
          scrollTo(0, document.body.scrollHeight);
          await pause(50);
        }
        result.scrolled = ids().length;
        byId("more").click();
        result.clicked = ids().length;
        await set("search", "caption 2999");
        result.found = [ids(), byId("more").hidden];
    """)  # fmt: skip
    assert 0 < result["start"] < result["scrolled"] < result["clicked"] < 200
    assert result["found"] == [["id2999"], True]


def test_the_browser_shows_a_training_report(browser, tiny_flags, tmp_path):
    assert run_training([*tiny_flags, "--eval-every", "2"]) == 0
    result = browser(tmp_path / "run" / "report.html", """
        await Promise.all(all("img").map((image) => image.decode()));
        result.pictures = all(".card img").map((image) => image.naturalWidth);
        result.names = all(".card:first-child .name").map((node) => node.textContent);
        result.order = ids();
        result.title = document.title;
    """)  # fmt: skip
    assert result["pictures"] == [40] * 4 and result["names"] == ["step 0", "step 2", "step 4"]
    assert result["order"] == ["red.png", "green.png", "blue.png", "yellow.png"] and result["title"] == "Training of run"
