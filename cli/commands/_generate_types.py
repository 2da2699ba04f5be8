"""Types of the options of `omniid generate`."""

import math

import click


class PictureSize(click.ParamType):
    """WIDTHxHEIGHT in pixels, both multiples of 16."""

    name = "WxH"

    def convert(self, value, param, ctx) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        width, separator, height = value.lower().partition("x")
        if not separator or not width.isdecimal() or not height.isdecimal():
            self.fail(f"{value!r} is no size; write it like 512x512", param, ctx)
        if min(int(width), int(height)) < 16 or int(width) % 16 or int(height) % 16:
            self.fail(f"width and height must be multiples of 16, got {value}", param, ctx)
        return int(width), int(height)


class Pose(click.ParamType):
    """YAW,PITCH,ROLL in degrees."""

    name = "yaw,pitch,roll"

    def convert(self, value, param, ctx) -> tuple[float, float, float]:
        if isinstance(value, tuple):
            return value
        try:
            yaw, pitch, roll = (float(part) for part in value.split(","))
            if not all(map(math.isfinite, (yaw, pitch, roll))):
                raise ValueError
        except ValueError:
            self.fail(f"{value!r} is no pose; write three angles in degrees, like 20,-5,0", param, ctx)
        return yaw, pitch, roll


class Strength(click.ParamType):
    """A number, or several that are spread over the steps."""

    name = "scale[,scale...]"

    def convert(self, value, param, ctx) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            scales = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            scales = ()
        if not scales or not all(map(math.isfinite, scales)):
            self.fail(
                f"{value!r} is no strength; write a number, or several for the steps, like 1.2,0.8,0.4", param, ctx
            )
        return scales


class Lora(click.ParamType):
    """FILE or FILE=WEIGHT."""

    name = "file[=weight]"

    def convert(self, value, param, ctx) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        source, separator, weight = value.rpartition("=")
        if not separator:
            source, weight = value, "1"
        try:
            factor = float(weight)
        except ValueError:
            factor = math.nan
        if not source or not math.isfinite(factor):
            wrong = f"{weight!r} is no weight" if source else f"{value!r} names no file"
            self.fail(f"{wrong}; write FILE=WEIGHT, like style.safetensors=0.8", param, ctx)
        return source, factor
