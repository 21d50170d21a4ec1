"""Render icons and emoji of npm's @iconify-json packages: a benchmark with natural shifts, and pairs to pre-train on.

The task `emoji` is 43 objects (cat, bell, umbrella ...), a few colour emoji of each to train on, and as shifted test
sets the same objects as line icons, glyphs, pixel art, engravings ...; the task `line` starts from line icons. A class
is the head noun of an icon's name. The packages of the tasks are not those of the pre-training pairs (game-icons is
split in halves), and what train and select have of a family under one name is in no other set.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from frontier import progress, replacing, say
from numpy.typing import NDArray
from PIL import Image

SIZE = 32  # pixels
CLASS_IMAGES = 7  # a class of a task has at least as many in the style that is trained on
MODULES = Path("node_modules") / "@iconify-json"


@dataclass(frozen=True)
class Package:
    """One of npm's @iconify-json, and which of its icons are drawn in which style: the first pattern that is found."""

    version: str
    licence: str  # SPDX; all of them allow redistribution: CC-BY* with attribution, CC-BY-SA* also under that licence
    styles: dict[str, str]
    family: str = ""  # of packages with the same drawings in other clothes


def _of(style: str, pattern: str = "") -> dict[str, str]:
    return {style: pattern}


PRETRAINING = {
    "mdi": Package("1.2.3", "Apache-2.0", _of("icon")),
    "tabler": Package("1.2.41", "MIT", _of("icon")),
    "lucide": Package("1.2.137", "ISC", _of("icon")),
    "hugeicons": Package("1.2.35", "MIT", _of("icon")),
    "iconoir": Package("1.2.11", "MIT", _of("icon")),
    "bi": Package("1.2.7", "MIT", _of("icon")),
    "fa6-solid": Package("1.2.4", "CC-BY-4.0", _of("icon")),
    "la": Package("1.2.1", "Apache-2.0", _of("icon")),
    "material-symbols": Package("1.2.98", "Apache-2.0", _of("icon", r"(?<!rounded)(?<!sharp)$")),
    "carbon": Package("1.2.29", "Apache-2.0", _of("icon")),
    "healthicons": Package("1.2.13", "MIT", _of("icon")),
    "uil": Package("1.2.3", "Apache-2.0", _of("icon")),
    "tdesign": Package("1.2.19", "MIT", _of("icon")),
    "streamline": Package("1.2.5", "CC-BY-4.0", _of("icon")),
    "icon-park-solid": Package("1.2.4", "Apache-2.0", _of("icon")),
    "icon-park": Package("1.2.4", "Apache-2.0", _of("coloured icon")),
    "fluent": Package("1.2.60", "MIT", _of("icon", r"^(?!.*-(ltr|rtl)-).*-24-(regular|filled)$")),
    "fluent-color": Package("1.2.21", "MIT", _of("coloured icon", r"-(24|32|48)$")),
    "fluent-emoji-flat": Package("1.2.6", "MIT", _of("emoji")),
    "fluent-emoji-high-contrast": Package("1.2.6", "MIT", _of("monochrome emoji")),
    "noto": Package("1.2.9", "Apache-2.0", _of("emoji")),
    "noto-v1": Package("1.2.5", "Apache-2.0", _of("emoji")),
    "openmoji": Package("1.2.29", "CC-BY-SA-4.0", _of("emoji")),
    "streamline-emojis": Package("1.2.4", "CC-BY-4.0", _of("emoji")),
    "pixelarticons": Package("1.2.9", "MIT", _of("pixel icon")),
    "game-icons": Package("1.2.4", "CC-BY-3.0", _of("game icon")),
}
TASK_PACKAGES = {
    "twemoji": Package("1.2.5", "CC-BY-4.0", _of("emoji")),
    "emojione": Package("1.2.3", "CC-BY-4.0", _of("emoji"), "emojione"),
    "emojione-v1": Package("1.2.3", "CC-BY-SA-4.0", _of("emoji"), "emojione"),
    "fxemoji": Package("1.2.2", "Apache-2.0", _of("emoji")),
    "emojione-monotone": Package("1.2.1", "CC-BY-4.0", _of("mono_emoji"), "emojione"),
    "ph": Package("1.2.2", "MIT", {"duotone": r"-duotone$", "glyph": r"-fill$", "line": r"(?<!-light)(?<!-bold)$"}),
    "solar": Package(
        "1.2.13", "CC-BY-4.0", {"duotone": r"-bold-duotone$", "glyph": r"-bold$", "line": r"-(linear|broken)$"}
    ),
    "mingcute": Package("1.2.8", "Apache-2.0", {"glyph": r"-fill$", "line": r"-line$"}),
    "ri": Package("1.2.10", "Apache-2.0", {"glyph": r"-fill$", "line": r"-line$"}),
    "ion": Package(
        "1.2.7", "MIT", {"line": r"^(?!ios-|md-|logo).*-outline$", "glyph": r"^(?!ios-|md-|logo).*(?<!-sharp)$"}
    ),
    "maki": Package("1.2.5", "CC0-1.0", _of("glyph")),
    "flat-color-icons": Package("1.2.3", "MIT", _of("flat_colour")),
    "streamline-ultimate-color": Package("1.2.2", "CC-BY-4.0", _of("flat_colour")),
    "streamline-freehand-color": Package("1.2.2", "CC-BY-4.0", _of("freehand")),
    "streamline-pixel": Package("1.2.0", "CC-BY-4.0", _of("pixel")),
    "pixel": Package("1.2.2", "CC-BY-4.0", _of("pixel")),
    "game-icons": Package("1.2.4", "CC-BY-3.0", _of("engraving")),
}
TASKS = ("emoji", "line")  # by the style that is trained on

# Classes, with the synonyms that count.
OBJECTS = """\
anchor; apple; backpack: bag, handbag; balloon; bed; bell; bird: duck, eagle, owl, dove, chick; bomb; bottle; bug:
beetle, ant, ladybug; boat: ship, sailboat, speedboat, ferry; book: books, notebook; box: package; bread: baguette,
croissant; brush: paintbrush; bus: trolleybus, minibus; cake: cupcake; calendar; camera; car: taxi, automobile;
castle; cat; chair: armchair; clock: stopwatch, alarm clock; cloud: clouds; crown; cup: mug, teacup; diamond: gem,
gemstone; dog: puppy; door; drum: drums; egg: eggs; envelope: mail; eye: eyes; fire: flame; fish; flower: rose, tulip,
sunflower, blossom, hibiscus; ghost; gift: present; glasses: sunglasses, eyeglasses; guitar; hammer; hat: cap;
headphones: headphone; heart: hearts; helmet; house: home; ice cream; key; knife: dagger; lamp: light bulb, bulb,
lightbulb, lantern; laptop: computer; leaf: leaves; lock: padlock, locked; magnet; medal; microphone; moon: crescent
moon; mountain: mountains; mushroom; pen: pencil; phone: telephone, mobile phone, smartphone; plane: airplane; rabbit;
ring; robot; rocket; scissors; shield; shirt: t shirt, tshirt; shoe: sneaker, boot, boots; skull; snowflake: snow;
star; sun; sword: swords; tent: camping tent; thermometer; tooth; train: tram, locomotive; tree; trophy; truck: lorry;
umbrella; watch: wristwatch; wheel; wrench: spanner"""
CLASS_OF = {
    word: name
    for name, _, synonyms in (entry.partition(": ") for entry in " ".join(OBJECTS.split()).split("; "))
    for word in [name, *synonyms.split(", ")]
    if word
}
# Words about the drawing, not the thing; and words that may follow the noun, as in "book open".
DRAWING, FOLLOWING = (
    frozenset(words.split())
    for words in (
        "outline outlined outlines fill filled bold duotone regular light thin linear line broken rounded sharp round "
        "solid twotone alt variant o ios md 24px 48px 40px negative flat color rtl ltr print a1 a2",
        "open closed half simple front side smile smiley badge fall winter shine big small mini vertical horizontal "
        "square electric double spin one two dual three face",
    )
)
# In the names of icons whose last word is a detail of what they show.
NOT_THE_THING = re.compile(
    "hot-dog|card|button|japanese|office|post|no-|off$|slash|eye-of|sign|person|man-|woman-|computer-mouse|cloud-|"
    "heart-hand|kiss|couple|face-with|smiling-face|grinning-face|moon-face|winking|flag|ball-|map|user|chart|add|remove|"
    "plus|minus|check|edit|search|upload|download|setting|share|sync"
)
ANIMALS = frozenset({"cat", "dog", "rabbit"})  # their emoji have faces
NOT_THE_ANIMAL = re.compile("hot-dog|sign|off$")
SKIN_TONE = re.compile(r"skin-tone|(^|-)(light|medium|dark|medium-light|medium-dark)$")
TRADEMARK = re.compile("logo|brand")

EPILOG = """\
examples:
  # into data/icons; npm fetches the packages, 175 MB, the first time
  python icons_data.py

  # other draws of the shots and the splits, 8 images of each class to train on where there are as many
  python icons_data.py --seed 1 --shots 8

written to --out:
  emoji/ line/       train/ select/ val/ and a folder for each style, in each a folder of images for each class, as
                     finetune_clip.py --data reads them; images.csv says what went where. select is for choosing the
                     learning rate
  pretrain/          images.npy and captions.jsonl, a line for each image, for pretrain_icons.py. Does not depend on
                     --seed and --shots: written once
  LICENSES.txt       the authors and licences of what was drawn
"""


class InputError(Exception):
    """Something the user gave does not fit; printed as one line."""


# ---- names ----


@dataclass(frozen=True)
class Icon:
    """One drawing of a package."""

    package: str
    name: str
    style: str
    captions: tuple[str, ...]  # its name and its aliases, without words about the drawing
    svg: str


def caption(name: str) -> str:
    """The words of an icon's name that say what it shows."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return " ".join([w for w in words if w not in DRAWING and not w.isdigit()] or words)


def class_of(name: str) -> str | None:
    """The class of the name's head noun, if it is one and the icon shows that."""
    words = caption(name).split()
    found = next((CLASS_OF[" ".join(words[-n:])] for n in (2, 1) if " ".join(words[-n:]) in CLASS_OF), None)
    if found is None:
        following = (n for n in (2, 1) if len(words) > n and FOLLOWING.issuperset(words[n:]))
        found = next((CLASS_OF[" ".join(words[:n])] for n in following if " ".join(words[:n]) in CLASS_OF), None)
    unlike = NOT_THE_ANIMAL if found in ANIMALS else NOT_THE_THING
    return None if unlike.search(name) else found


def for_pretraining(package: str, name: str) -> bool:
    """Which half of a package that both uses share an icon is in."""
    return hashlib.md5(f"{package}:{name}".encode()).digest()[0] < 128


# ---- packages ----


def install(folder: Path) -> None:
    """Has npm put the packages that ``folder`` lacks into it. Raises InputError where they are not to be had."""
    packages = PRETRAINING | TASK_PACKAGES
    missing = [f"@iconify-json/{p}@{packages[p].version}" for p in packages if not (folder / MODULES / p).is_dir()]
    if not missing:
        return
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder), *missing]
    say(f"installing {len(missing)} packages into {folder}")
    if shutil.which("npm") is None:
        raise InputError(
            f"{folder}: expected {missing[0]} and {len(missing) - 1} others, and found no npm to install them; "
            "install npm, or name a folder that has them with --npm"
        )
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise InputError(
            f"npm could not install into {folder}: {' '.join(reason)}; see whether it reaches its registry"
        )


def _json(folder: Path, package: str, file: str) -> Any:
    path = folder / MODULES / package / file
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected JSON of @iconify-json/{package}, got {error}; remove the folder, "
            "for npm to install it anew"
        ) from None


def read(folder: Path, package: str, expected: Package) -> list[Icon]:
    """The icons of a package. Raises InputError where version or licence are not the expected ones."""
    about = _json(folder, package, "info.json")
    got = {"version": _json(folder, package, "package.json")["version"], "licence": about["license"]["spdx"]}
    for what, value in got.items():
        if value != getattr(expected, what):
            raise InputError(
                f"{folder / MODULES / package}: expected {what} {getattr(expected, what)}, got {value}; "
                "remove the folder, for npm to install it anew"
            )
    content = _json(folder, package, "icons.json")
    aliases = defaultdict(list)
    for alias, of in content.get("aliases", {}).items():
        aliases[of["parent"]].append(alias)
    icons = []
    for name, icon in content["icons"].items():
        style = next((s for s, pattern in expected.styles.items() if re.search(pattern, name)), None)
        if style is None or icon.get("hidden") or TRADEMARK.search(name):
            continue
        if "emoji" in style and SKIN_TONE.search(name):
            continue
        names = dict.fromkeys(caption(n) for n in [name, *aliases[name]])
        box = [icon.get(key, content.get(key, default)) for key, default in _BOX.items()]
        icons.append(Icon(package, name, style, tuple(names), _svg(icon["body"], *box)))
    return icons


_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}


def _svg(body: str, left: float, top: float, width: float, height: float) -> str:
    """The drawing in black, in the middle of a square, with a margin."""
    side = max(width, height) * 1.06
    box = f"{left + (width - side) / 2} {top + (height - side) / 2} {side} {side}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}">{body.replace("currentColor", "#000")}</svg>'
    )


# ---- images ----


def render(svg: str) -> NDArray[np.uint8] | None:
    """The drawing on white, (SIZE, SIZE, 3); None where the renderer fails or nothing is seen."""
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=svg, background="#ffffff", width=SIZE, height=SIZE, skip_system_fonts=True
        )
    except ValueError:
        return None
    image = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))
    return image if image.std() > 4 else None


def draw(icons: Sequence[Icon], what: str) -> Iterator[tuple[Icon, NDArray[np.uint8]]]:
    """Yields the icons that can be rendered, in order, with their images."""
    with ProcessPoolExecutor(os.cpu_count()) as pool, progress(f"drawing {what}", len(icons), "icon") as bar:
        for icon, image in zip(icons, pool.map(render, (i.svg for i in icons), chunksize=64), strict=True):
            bar.update()
            if image is not None:
                yield icon, image


# ---- tasks ----


Drawn = tuple[Icon, NDArray[np.uint8], str]  # and its class


def split(task: str, drawn: Sequence[Drawn], shots: int, seed: int) -> dict[str, list[Drawn]]:
    """Which drawings are train, select, val and each shifted set of a task.

    ``shots`` of a class's drawings are trained on, but no more than half of them or 4. A third of the rest is select.
    """
    by_class: dict[str, list[Drawn]] = defaultdict(list)
    for item in drawn:
        if item[0].style == task:
            by_class[item[2]].append(item)
    by_class = {name: items for name, items in sorted(by_class.items()) if len(items) >= CLASS_IMAGES}
    sets: dict[str, list[Drawn]] = {"train": [], "select": [], "val": []}
    tuned_on = set()
    for name, items in by_class.items():
        groups: dict[tuple[str, str], list[Drawn]] = defaultdict(list)
        for item in items:
            groups[_group(item[0])].append(item)
        order = sorted(groups)
        random.Random(f"{seed} {name}").shuffle(order)
        pool: list[Drawn] = []
        while len(pool) < min(shots, max(4, len(items) // 2)):
            tuned_on.add(order[0])
            pool += groups[order.pop(0)]
        sets["train"] += pool[:shots]
        selecting = round(len(order) / 3)
        for i, group in enumerate(order):
            sets["select" if i < selecting else "val"] += groups[group]
        tuned_on.update(order[:selecting])
    for style in sorted({icon.style for icon, _, _ in drawn} - {task}):
        sets[style] = [d for d in drawn if d[0].style == style and d[2] in by_class and _group(d[0]) not in tuned_on]
    return sets


def _group(icon: Icon) -> tuple[str, str]:
    return TASK_PACKAGES[icon.package].family or icon.package, icon.captions[0]


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, in the place of ``folder`` when all went well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        if folder.exists():
            folder.rename(temporary / ".old")
        temporary.rename(folder)
        shutil.rmtree(folder / ".old", ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_task(folder: Path, sets: dict[str, list[Drawn]]) -> None:
    """Writes ``folder/<set>/<class>/<package>__<name>.png`` and images.csv."""
    with replacing_folder(folder) as temporary, open(temporary / "images.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["set", "class", "package", "icon", "licence"])
        for name, drawn in sets.items():
            for icon, image, label in drawn:
                rows.writerow([name, label, icon.package, icon.name, TASK_PACKAGES[icon.package].licence])
                path = temporary / name / label.replace(" ", "_") / f"{icon.package}__{icon.name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)


def write_pretraining(folder: Path, drawn: Sequence[tuple[Icon, NDArray[np.uint8]]]) -> None:
    """Writes images.npy, uint8 (n, SIZE, SIZE, 3), and captions.jsonl."""
    with replacing_folder(folder) as temporary:
        np.save(temporary / "images.npy", np.stack([image for _, image in drawn]))
        with open(temporary / "captions.jsonl", "w", encoding="utf-8") as file:
            for icon, _ in drawn:
                row = {"package": icon.package, "icon": icon.name, "kind": icon.style, "captions": icon.captions}
                file.write(json.dumps(row) + "\n")


def licences(folder: Path) -> str:
    """The text of LICENSES.txt."""
    lines = [
        "The images here are renderings of icons of these npm packages. Whoever passes them on keeps the notice (MIT,",
        "ISC, Apache-2.0) or names the author (CC-BY), and uses the same licence where it is CC-BY-SA.",
        "",
    ]
    for package, of in sorted((PRETRAINING | TASK_PACKAGES).items()):
        about = _json(folder, package, "info.json")
        use = "pretrain" * (package in PRETRAINING), "tasks" * (package in TASK_PACKAGES)
        author, where = about["author"]["name"], about["author"].get("url", "")
        lines.append(f"{package} {of.version}: {of.licence}, {author} {where} ({' and '.join(filter(None, use))})")
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace) -> None:
    """Writes everything below --out."""
    packages = args.npm or args.out / "npm"
    install(packages)
    labelled = {}
    for package, of in TASK_PACKAGES.items():
        for icon in read(packages, package, of):
            label = class_of(icon.name)
            if label and not (package in PRETRAINING and for_pretraining(package, icon.name)):
                labelled[icon] = label
    drawn = [(icon, image, labelled[icon]) for icon, image in draw(list(labelled), "the tasks")]
    args.out.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        sets = split(task, drawn, args.shots, args.seed)
        write_task(args.out / task, sets)
        classes = len({label for _, _, label in sets["train"]})
        print(f"{task}: {classes} classes; images:", ", ".join(f"{name} {len(items)}" for name, items in sets.items()))
    with replacing(args.out / "LICENSES.txt") as file:
        file.write_text(licences(packages), encoding="utf-8")
    if (args.out / "pretrain").is_dir():
        print(f"{args.out / 'pretrain'}: kept as it is")
    else:
        tested = {image.tobytes() for _, image, _ in drawn}
        pairs = [pair for pair in draw(pretraining_icons(packages), "pairs") if pair[1].tobytes() not in tested]
        write_pretraining(args.out / "pretrain", pairs)
        print(f"pretrain: {len(pairs)} images")
    used = Counter(of.licence for of in (PRETRAINING | TASK_PACKAGES).values())
    print("packages by licence:", ", ".join(f"{n} {name}" for name, n in used.most_common()))
    print(f"authors and licences: {args.out / 'LICENSES.txt'}")


def pretraining_icons(packages: Path) -> list[Icon]:
    """Those with a word in their name; of a package that the tasks use too, its other half."""
    icons = [icon for p, of in PRETRAINING.items() for icon in read(packages, p, of)]
    icons = [icon for icon in icons if re.search("[a-z]{3}", icon.captions[0])]
    return [icon for icon in icons if icon.package not in TASK_PACKAGES or for_pretraining(icon.package, icon.name)]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("data/icons"), metavar="DIR", help="where to write (%(default)s)")
    add("--npm", type=Path, metavar="DIR", help="the folder with node_modules, or for npm to put it in (npm/ in --out)")
    add("--seed", type=int, default=0, help="draws the shots and the splits (%(default)s)")
    add("--shots", type=int, default=4, help="images to train on of a class, where it has as many (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    args = build_parser().parse_args(argv)
    try:
        if args.shots < 1:
            raise InputError(f"--shots: expected a whole number of at least 1, got {args.shots}")
        run(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
