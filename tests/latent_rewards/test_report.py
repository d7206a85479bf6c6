import json
import re
import shutil
import subprocess

import pytest
import torch

from latent_rewards.contracts import DataError
from latent_rewards.report import Report, ShownClip

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def moving_square(frames: int = 9, size: int = 16) -> torch.Tensor:
    video = torch.zeros(frames, 3, size, size)
    for t in range(frames):
        video[t, :2, 4:8, t : t + 4] = 1
    return video


def sample_report() -> Report:
    clips = torch.stack([moving_square(), moving_square().flip(3)])
    report = Report("Title & <tag>")
    report.add_heading("First").add_text("one paragraph\n\nand <b>another</b>")
    report.add_table(
        ["method", "total", "note"],
        [["ceiling", 99.0, "x"], ["a", 1.25, None], ["b", -3.5, "y"], ["c", float("nan"), "z"]],
        caption="a caption",
        best={"total": "max"},
        unranked=["ceiling"],
    )
    report.add_curves(
        "Curve", {"a <b>": ([0, 1, 2], [1.0, 2.0, float("nan")]), "_b": ([0, 1], [1, 1], [0, 0], [2, 2])}, "x", "y"
    )
    report.add_curves("Second curve", {"a": ([0, 1], [0, 1])}, "x", "y")
    report.add_videos("Grid", {"m1": clips, "m2": clips[:, :5]}, ["prompt one", {"prompt": "prompt two"}], fps=8)
    return report.add_settings({"lro": {"beta": 0.05, "rewards": ["r1", "r2"]}, "seed": 0})


@pytest.fixture(scope="module")
def page() -> str:
    return sample_report().render()


def test_page_is_self_contained(page: str) -> None:
    body = page[page.index("<style>") :]
    assert "@import" not in body and "<link" not in body and "<img" not in body and "<iframe" not in body
    addresses = re.findall(r"""\b(?:src|href|srcset|poster)\s*=\s*["']?([^"'\s>]+)|url\(["']?([^"')]+)""", body)
    assert len(addresses) > 4
    assert all(a.startswith(("data:video/mp4;base64,", "#")) for pair in addresses for a in pair if a)
    assert "default-src 'none'" in page


def test_text_is_escaped(page: str) -> None:
    assert "<h1>Title &amp; &lt;tag&gt;</h1>" in page
    assert "<p>one paragraph</p>" in page
    assert "<p>and &lt;b&gt;another&lt;/b&gt;</p>" in page
    assert "<tag>" not in page


def test_table_marks_the_best_that_competes(page: str) -> None:
    table = re.search(r'<table class="numbers">.*?</table>', page, re.S).group()
    assert re.findall(r'title="best">([^<]*)', table) == ["1.25"]
    assert '<tr class="unranked">' in table
    assert '<td class="number">\u22123.50</td>' in table
    assert '<td class="number">–</td>' in table
    assert "<td>y</td>" in table
    assert re.findall(r'<th scope="col"( class="number")?>', table) == ["", ' class="number"', ""]


def test_best_minimum_marks_ties() -> None:
    page = Report("t").add_table(["m", "d"], [["a", 1.0], ["b", 2.0], ["c", 1.0]], best={"d": "min"}).render()
    assert re.findall(r'title="best">([^<]*)', page) == ["1.00", "1.00"]


def test_charts_are_inline_vectors_with_their_own_ids(page: str) -> None:
    charts = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(charts) == 2
    ids = [set(re.findall(r'\bid="([^"]+)"', chart)) for chart in charts]
    assert ids[0] and ids[1] and not ids[0] & ids[1]
    for chart, known in zip(charts, ids, strict=True):
        assert set(re.findall(r'(?:url\(|href=")#([^")]+)', chart)) <= known
    assert "currentColor" in charts[0] and "#010203" not in charts[0]
    assert "a &lt;b&gt;" in charts[0]
    assert ">x</text>" in charts[0]


def test_video_grid_has_a_row_per_prompt_and_a_column_per_method(page: str) -> None:
    videos = re.findall(r"<video [^>]*>", page)
    assert [re.search('aria-label="([^"]*)"', v).group(1) for v in videos] == [
        "m1: prompt one", "m2: prompt one", "m1: prompt two", "m2: prompt two",
    ]  # fmt: skip
    assert all(f" {word} " in video for video in videos for word in ("autoplay", "loop", "muted", "playsinline"))
    assert all('width="128" height="128"' in video for video in videos)
    assert '<th scope="row">prompt two</th>' in page


def test_a_gallery_shows_clips_of_any_size_with_name_value_and_text() -> None:
    clips = [
        ShownClip(moving_square(), 8, "a <b>.mp4", "0.5", 'said "so"'),
        ShownClip(torch.rand(1, 3, 201, 301, generator=torch.Generator().manual_seed(0)), 29.97, "b"),
    ]
    page = Report("t").add_clips("Best", clips, caption="look").render()
    videos = re.findall(r"<video [^>]*>", page)
    assert [re.search('width="([0-9]+)" height="([0-9]+)"', v).groups() for v in videos] == [
        ("128", "128"),
        ("302", "202"),
    ]
    assert all(f" {word} " in video for video in videos for word in ("autoplay", "loop", "muted", "playsinline"))
    assert "<b>0.5</b> a &lt;b&gt;.mp4<br><q>said &#34;so&#34;</q>" in page
    assert "<script" in page and page.count("<q>") == 1
    with pytest.raises(DataError, match="'Best' needs at least one clip"):
        Report("t").add_clips("Best", [])


def test_a_histogram_is_a_chart_of_finite_values() -> None:
    page = Report("t").add_histogram("Spread", [1.0, 2.0, 2.0], "value", "clips").render()
    assert "<h3>Spread</h3><svg" in page and ">value</text>" in page
    for values in ([], [float("nan")], [1.0, float("inf")]):
        with pytest.raises(DataError, match="'Spread' needs finite values"):
            Report("t").add_histogram("Spread", values, "x", "y")


def test_settings_are_folded_with_dotted_names(page: str) -> None:
    block = re.search(r"<details>.*?</details>", page, re.S).group()
    assert re.findall(r"<th scope=\"row\">([^<]*)</th><td>([^<]*)</td>", block) == [
        ("lro.beta", "0.05"),
        ("lro.rewards", "r1, r2"),
        ("seed", "0"),
    ]


def test_page_without_videos_has_no_script() -> None:
    page = Report("t").add_text("x").render()
    assert "<script" not in page and "<button" not in page


def test_save_replaces_the_file_whole(tmp_path) -> None:
    path = tmp_path / "new" / "page.html"
    Report("first").save(path)
    assert Report("second").save(path) == path
    assert "<h1>second</h1>" in path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


def test_same_content_gives_the_same_page(page: str) -> None:
    assert sample_report().render() == page


def test_errors_name_what_is_wrong() -> None:
    report, clips = Report("t"), torch.zeros(2, 3, 3, 8, 8)
    with pytest.raises(DataError, match="2 cells for 1"):
        report.add_table(["a"], [["x", 1]])
    with pytest.raises(DataError, match="totl"):
        report.add_table(["a"], [["x"]], best={"totl": "max"})
    with pytest.raises(DataError, match="no series"):
        report.add_curves("c", {}, "x", "y")
    with pytest.raises(DataError, match="'s'"):
        report.add_curves("c", {"s": ([1, 2], [1])}, "x", "y")
    with pytest.raises(DataError, match="at least one"):
        report.add_videos("v", {}, ["p"])
    with pytest.raises(DataError, match="N = 1"):
        report.add_videos("v", {"m": clips}, ["p"])
    with pytest.raises(DataError, match="one height and width"):
        report.add_videos("v", {"m": clips, "n": torch.zeros(2, 3, 3, 8, 16)}, ["p", "q"])
    assert report.blocks == []


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_clips_play_in_a_browser(tmp_path) -> None:
    # The browser's clock is virtual and runs ahead of its decoder; each turn of the loop gives the decoder real time.
    probe = """<script>
        const timer = setInterval(() => {
            for (let i = 0, x = 0; i < 1e7; i++) x += i;
            const found = [...document.querySelectorAll("video")];
            for (const v of found) {
                v.best = Math.max(v.best ?? 0, v.readyState);
                if (v.readyState < 3) continue;
                v.moved ||= v.first !== undefined && v.currentTime > 0 && v.currentTime !== v.first;
                v.first = v.currentTime;
            }
            document.body.dataset.clips = JSON.stringify(found.map(v => [v.best, !!v.moved, v.paused, v.videoWidth]));
            if (found.every(v => v.moved)) clearInterval(timer);
        }, 100);
        </script></body>"""
    path = tmp_path / "probed.html"
    path.write_text(sample_report().render().replace("</body>", probe), encoding="utf-8")
    switches = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    switches += " --disable-component-update --disable-sync --window-size=1366,2000 --virtual-time-budget=20000"
    command = [CHROMIUM, *switches.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    clips = json.loads(re.search(r'data-clips="([^"]*)"', dom).group(1).replace("&quot;", '"'))
    assert len(clips) == 4
    for ready_state, moved, paused, width in clips:
        assert ready_state >= 3 and moved and not paused and width == 128


def test_a_scatter_is_drawn_and_needs_finite_pairs() -> None:
    page = Report("t").add_scatter("Points", [0.0, 1.0], torch.tensor([1.0, 2.0]), "x", "y", "a caption").render()
    assert "Points" in page and "a caption" in page and "<svg" in page
    for x, y in [([], []), ([1.0], [1.0, 2.0]), ([float("nan")], [1.0])]:
        with pytest.raises(DataError, match="needs finite x and y"):
            Report("t").add_scatter("Points", x, y, "x", "y")
