"""Draw talking characters: a head with hair, eyes, glasses, clothes, a mouth that opens, and a few expressions.

Pictures are 128x128 with soft edges. Coordinates run from -1 to 1, y downwards. F frames, R = 128 rows and columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

SIZE = 128
FRAME_RATE_HZ = 16
EXPRESSIONS = ("smile", "surprise", "anger", "sadness")
_EDGE = 52.0  # the slope of an edge: about three pixels wide
_ROWS, _COLUMNS = torch.meshgrid(*[(torch.arange(SIZE) + 0.5) / SIZE * 2 - 1] * 2, indexing="ij")
HAIR = ("short", "long", "bun", "sides", "curls")
_HAIR_COLORS = (
    (0.10, 0.07, 0.06), (0.24, 0.14, 0.08), (0.42, 0.25, 0.12), (0.75, 0.56, 0.28), (0.62, 0.24, 0.10),
    (0.55, 0.55, 0.57), (0.85, 0.85, 0.86), (0.20, 0.22, 0.36), (0.55, 0.20, 0.36),
)  # fmt: skip


@dataclass(frozen=True)
class Character:
    """Who is drawn. Colours are RGB [3] in 0..1, lengths in picture coordinates."""

    sky: Tensor
    ground: Tensor
    skin: Tensor
    hair: Tensor
    shirt: Tensor
    collar: Tensor
    iris: Tensor
    hair_style: str
    has_glasses: bool
    age: float
    face_width: float
    face_height: float
    eye_x: float
    eye_y: float
    eye_radius: float
    mouth_y: float
    mouth_width: float
    hairline: float


@dataclass(frozen=True)
class Motion:
    """What changes from frame to frame, each [F]: mouth, gaze, pose and how strong each expression is (0..1)."""

    opening: Tensor
    roundness: Tensor
    lids: Tensor
    x: Tensor
    y: Tensor
    tilt: Tensor
    smile: Tensor
    surprise: Tensor
    anger: Tensor
    sadness: Tensor

    def cut(self, start: int, stop: int) -> Motion:
        """Return the frames from `start` to `stop`."""
        return Motion(*(getattr(self, item.name)[start:stop] for item in fields(self)))

    @classmethod
    def still(cls, num_frames: int = 1, **given: Tensor) -> Motion:
        """Return a motion at rest, mouth closed, eyes open, but for what is `given`."""
        values = {item.name: torch.zeros(num_frames) for item in fields(cls)}
        values["lids"] = torch.ones(num_frames)
        return cls(**{**values, **given})


def draw_character(generator: torch.Generator) -> Character:
    """Invent a character."""

    def real(low: float, high: float) -> float:
        return low + (high - low) * torch.rand(1, generator=generator).item()

    def color(low: float, high: float) -> Tensor:
        return torch.tensor([real(low, high) for _ in range(3)])

    def pick(count: int) -> int:
        return int(real(0, count - 1e-6))

    red = real(0.42, 0.98)
    green = red * real(0.68, 0.83)
    age = real(0, 1)
    hair = torch.tensor(_HAIR_COLORS[pick(len(_HAIR_COLORS))]) * real(0.8, 1.15)
    if age > 0.75:
        hair = hair * 0.4 + torch.tensor([0.78, 0.78, 0.80]) * 0.6
    return Character(
        sky=color(0.25, 0.95),
        ground=color(0.1, 0.8),
        skin=torch.tensor([red, green, green * real(0.70, 0.9)]),
        hair=hair.clamp(0.02, 0.97),
        shirt=color(0.05, 0.95),
        collar=color(0.1, 0.98),
        iris=color(0.05, 0.5),
        hair_style=HAIR[pick(len(HAIR))],
        has_glasses=real(0, 1) < 0.3,
        age=age,
        face_width=real(0.44, 0.53),
        face_height=real(0.58, 0.67),
        eye_x=real(0.17, 0.22),
        eye_y=real(0.08, 0.15),
        eye_radius=real(0.078, 0.1),
        mouth_y=real(0.31, 0.37),
        mouth_width=real(0.155, 0.205),
        hairline=real(0.08, 0.26),
    )


def render(who: Character, motion: Motion) -> Tensor:
    """Draw a character: float32 [F, 3, R, R] in 0..1."""
    canvas = _Canvas(who, motion)
    canvas.background()
    canvas.body()
    canvas.head()
    canvas.eyes()
    canvas.mouth()
    canvas.details()
    return canvas.image


def mouth_box(who: Character) -> tuple[int, int, int, int]:
    """Return where the mouth of a head at rest may be: top, bottom, left, right, in pixels."""
    middle = who.mouth_y + 0.06
    rows = [round((middle + side * 0.25 + 1) * SIZE / 2) for side in (-1, 1)]
    columns = [round((side * (who.mouth_width + 0.07) + 1) * SIZE / 2) for side in (-1, 1)]
    return rows[0], rows[1], columns[0], columns[1]


@dataclass
class _Canvas:
    who: Character
    motion: Motion
    image: Tensor = field(init=False)

    def __post_init__(self) -> None:
        m = self.motion
        dx, dy, angle = (value[:, None, None] for value in (m.x, m.y, m.tilt))
        moved_x, moved_y = _COLUMNS - dx, _ROWS - dy
        self.body_x = _COLUMNS - 0.4 * dx
        self.x = angle.cos() * moved_x + angle.sin() * moved_y  # [F, R, R], the head's own coordinates
        self.y = angle.cos() * moved_y - angle.sin() * moved_x

    def per_frame(self, name: str) -> Tensor:
        """Return a quantity of the motion, [F, 1, 1]."""
        value: Tensor = getattr(self.motion, name)
        return value[:, None, None]

    def paint(self, color: Tensor, inside: Tensor, opacity: float | Tensor = 1.0) -> None:
        """Paint where the signed distance `inside` [F, R, R] is positive."""
        alpha = (torch.sigmoid(inside * _EDGE) * opacity)[:, None]
        self.image = torch.lerp(self.image, color[None, :, None, None], alpha)

    def background(self) -> None:
        blend = (_ROWS[None, None] + 1) / 2
        sky, ground = self.who.sky[None, :, None, None], self.who.ground[None, :, None, None]
        self.image = (sky * (1 - blend) + ground * blend).expand(len(self.x), -1, -1, -1)

    def body(self) -> None:
        who, x, y = self.who, self.x, self.y
        if who.hair_style == "long":
            self.paint(who.hair * 0.85, _ellipse(x, y, 0, 0.12, who.face_width + 0.15, who.face_height + 0.17))
        if who.hair_style == "bun":
            self.paint(who.hair * 0.9, _ellipse(x, y, 0, -0.80, 0.19, 0.17))
        rows = _ROWS.expand_as(x)
        self.paint(who.shirt, _ellipse(self.body_x, rows, 0, 1.12, 0.75, 0.42))
        self.paint(who.collar, _ellipse(self.body_x, rows, 0, 0.76, 0.27, 0.16))
        self.paint(who.skin * 0.86, _ellipse(x, y, 0, 0.66, 0.17, 0.25))

    def head(self) -> None:
        who, x, y = self.who, self.x, self.y
        for side in (-1, 1):
            self.paint(who.skin * 0.92, _ellipse(x, y, side * (who.face_width + 0.02), 0.02, 0.07, 0.11))
        if who.hair_style == "curls":
            for angle in range(-100, 101, 25):
                turn = math.radians(angle)
                place = (who.face_width + 0.03) * math.sin(turn), -0.12 - (who.face_height - 0.04) * math.cos(turn)
                self.paint(who.hair, _ellipse(x, y, *place, 0.15, 0.15))
        if who.hair_style == "sides":
            for side in (-1, 1):
                self.paint(who.hair, _ellipse(x, y, side * (who.face_width - 0.02), -0.16, 0.12, 0.22))
        else:
            self.paint(who.hair, _ellipse(x, y, 0, -0.12, who.face_width + 0.09, who.face_height + 0.02))
        face = _ellipse(x, y, 0, 0.03, who.face_width, who.face_height)
        if who.hair_style != "sides":
            parting = 0.10 * (x - 0.12) ** 2 / 0.2 if who.hair_style in ("short", "bun") else 0.0
            face = torch.minimum(face, y + who.face_height - who.hairline - 0.12 - parting)
        self.paint(who.skin, face)
        blush = who.skin * torch.tensor([1.0, 0.72, 0.70])
        for side in (-1, 1):
            spot = torch.exp(-(((x - side * 0.29) / 0.11) ** 2) - ((y - 0.19) / 0.08) ** 2)
            self.image = torch.lerp(
                self.image, blush[None, :, None, None], (spot * (0.25 + 0.6 * self.per_frame("smile")))[:, None]
            )

    def eyes(self) -> None:
        who, x, y = self.who, self.x, self.y
        surprise, anger, sadness = (self.per_frame(name) for name in ("surprise", "anger", "sadness"))
        lids = self.per_frame("lids") * (1 - 0.22 * self.per_frame("smile") - 0.2 * anger)
        radius = who.eye_radius * (1 + 0.28 * surprise)
        for side in (-1, 1):
            center = side * who.eye_x
            eye = _ellipse(x, y, center, -who.eye_y, radius * 1.25, (radius * lids).clamp(min=0.02))
            shown = ((lids - 0.12) * 4).clamp(0, 1)
            self.paint(torch.tensor([0.97, 0.97, 0.97]), eye, shown)
            iris = _ellipse(x, y, center, -who.eye_y, who.eye_radius * 0.62, who.eye_radius * 0.62)
            self.paint(who.iris, torch.minimum(eye, iris), shown)
            glint = _ellipse(x, y, center + 0.022, -who.eye_y - 0.022, 0.018, 0.018)
            self.paint(torch.ones(3), torch.minimum(eye, glint), 0.9 * shown)
            lash = _ellipse(x, y - 0.12 * (x - center) ** 2 / 0.1, center, -who.eye_y + 0.01, radius * 1.2, 0.02)
            self.paint(who.skin * 0.45, lash, 1 - shown)
            slope = side * (0.55 * anger - 0.45 * sadness)
            height = -who.eye_y - 0.165 - 0.085 * surprise + 0.035 * anger
            brow_y = y + slope * (x - center)
            self.paint(who.hair * 0.75, _ellipse(x, brow_y, center, height, 0.13, 0.032))

    def mouth(self) -> None:
        who, x, y = self.who, self.x, self.y
        opening = self.per_frame("opening").clamp(0, 1)
        smile = self.per_frame("smile") - 0.75 * self.per_frame("sadness")
        pursed = 0.32 * self.per_frame("roundness") + 0.14 * self.per_frame("surprise")
        half_width = who.mouth_width * (1 - 0.10 * opening - pursed + 0.2 * self.per_frame("smile"))
        half_height = 0.022 + 0.165 * opening
        middle = who.mouth_y + 0.05 * opening
        bent = y + smile * 0.075 * ((x / who.mouth_width) ** 2 - 0.45)
        lips = who.skin * torch.tensor([0.84, 0.46, 0.48])
        self.paint(lips, _ellipse(x, bent, 0, middle, half_width + 0.035, half_height + 0.028))
        inner = half_height - 0.014
        self.paint(torch.tensor([0.20, 0.04, 0.06]), _ellipse(x, bent, 0, middle, half_width, inner))
        shown = ((opening - 0.12) * 5).clamp(0, 1)
        teeth = _ellipse(x, bent, 0, middle, half_width * 0.86, inner.clamp(min=0.02))
        self.paint(torch.tensor([0.95, 0.94, 0.92]), torch.minimum(teeth, middle - inner * 0.45 - bent), shown)
        tongue = _ellipse(x, bent, 0, middle + inner * 0.72, half_width * 0.55, (inner * 0.4).clamp(min=0.02))
        self.paint(torch.tensor([0.80, 0.36, 0.38]), torch.minimum(tongue, teeth), shown * 0.9)

    def details(self) -> None:
        who, x, y = self.who, self.x, self.y
        self.paint(who.skin * 0.80, _ellipse(x, y, 0, 0.12, 0.05, 0.065), 0.7)
        if who.age > 0.6:
            for side in (-1, 1):
                fold = 0.012 - (_ellipse(x, y, side * 0.10, 0.23, 0.20, 0.17)).abs()
                outside = torch.minimum(fold, side * x - 0.21)
                self.paint(who.skin * 0.82, outside, 0.8 * (who.age - 0.3))
        if who.has_glasses:
            frame = torch.tensor([0.13, 0.12, 0.14])
            for side in (-1, 1):
                ring = _ellipse(x, y, side * (who.eye_x + 0.005), -who.eye_y, 0.155, 0.135).abs()
                self.paint(frame, 0.016 - ring, 0.9)
            bridge = torch.minimum(0.014 - (y + who.eye_y).abs(), who.eye_x - 0.145 - x.abs())
            self.paint(frame, bridge, 0.9)


def _ellipse(
    x: Tensor, y: Tensor, cx: float | Tensor, cy: float | Tensor, rx: float | Tensor, ry: float | Tensor
) -> Tensor:
    """Return the signed distance to an ellipse to first order, positive inside."""
    px, py = (x - cx) / rx, (y - cy) / ry
    radius = torch.sqrt(px * px + py * py + 1e-8)
    slope = torch.sqrt((px / rx) ** 2 + (py / ry) ** 2 + 1e-8)
    first_order = radius * (1 - radius) / slope
    # a flat ellipse is far from round: past its ends the first order is too near
    return torch.minimum(first_order, torch.minimum(rx - (x - cx).abs(), ry - (y - cy).abs()))
