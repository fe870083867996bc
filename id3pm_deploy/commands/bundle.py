"""``id3pm-deploy bundle``: the artefact itself, as files and as a matter of trust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from .options import PATH, printable


@click.group(name="bundle")
def command() -> None:
    """Pack, unpack, verify, sign or migrate a BUNDLE.

    BUNDLE_FORMAT.md in the repository says what a bundle is.
    """


@command.command(short_help="Write BUNDLE as one file.")
@click.argument("bundle", type=PATH)
@click.argument("out", type=PATH, metavar="FILE.tar")
@click.option("--force", is_flag=True, help="Replace FILE.tar.")
def pack(bundle: Path, out: Path, force: bool) -> None:
    """Write BUNDLE as one file.

    The tar is not compressed, and the same bundle always gives the same bytes.
    """
    from ..bundle.archive import pack_bundle

    size = pack_bundle(bundle, out, force=force)
    click.echo(f"{out} ({size / 1e6:.1f} MB)")


@command.command(short_help="Make the BUNDLE in FILE.tar again.")
@click.argument("tar", type=PATH, metavar="FILE.tar")
@click.argument("folder", type=PATH)
def unpack(tar: Path, folder: Path) -> None:
    """Make the BUNDLE in FILE.tar again, as FOLDER.

    Everything is checked; FOLDER appears when it is complete, or not at all.
    """
    from ..bundle.archive import unpack_bundle

    made = unpack_bundle(tar, folder)
    click.echo(f"{folder} ({len(made.manifest.files)} files)")


@command.command(short_help="Check every byte of a BUNDLE or FILE.tar.")
@click.argument("path", type=PATH)
@click.option(
    "--require-trusted", is_flag=True, help="Fail unless a trusted key signed it."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def verify(path: Path, require_trusted: bool, as_json: bool) -> None:
    """Check a BUNDLE, a folder or a FILE.tar: every byte is hashed.

    The exit status is 1 if anything is damaged, or if there is a signature that is not
    good or cannot be checked.
    """
    from ..bundle.verification import verify_path

    found = verify_path(path)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        for line in _lines(found):
            click.echo(printable(line))
    found.check_signature(require_trusted=require_trusted)


def _lines(found: Any) -> list[str]:
    signature = found.signature
    texts = {
        "none": "none",
        "good": f"good, by {signature.key}, which you "
        + ("trust" if signature.trusted else "do not trust"),
        "bad": f"NOT GOOD: {signature.why}",
        "unchecked": f"by {signature.key}, not checked: the package cryptography is "
        "not installed",
    }
    lines = [
        f"files      {found.files}, {found.size / 1e6:.1f} MB, as the manifest says",
        f"signature  {texts[signature.state]}",
    ]
    for target, plan in found.plans.items():
        state = "trusted" if plan.trusted else "NOT TRUSTED"
        lines.append(f"plan       {target}: {state}: {plan.reason}")
    if found.unlisted:
        lines.append(f"not listed {', '.join(map(ascii, found.unlisted))}")
    return lines


@command.command(short_help="Sign BUNDLE as it is now.")
@click.argument("bundle", type=PATH)
@click.option("--key", required=True, type=PATH, help="What `bundle keygen` made.")
def sign(bundle: Path, key: Path) -> None:
    """Sign BUNDLE as it is now; adding to it later removes the signature."""
    from ..bundle.signing import sign_bundle

    click.echo(f"signed by {sign_bundle(bundle, key)}")


@command.command(short_help="Make a key for signing.")
@click.argument("out", type=PATH, metavar="FILE")
def keygen(out: Path) -> None:
    """Make a key for signing: FILE, which you keep, and FILE.pub, which you give away.

    FILE is not encrypted; only its mode, 0600, protects it.
    """
    from ..bundle.signing import make_key

    public, key = make_key(out)
    click.echo(f"private key  {out}")
    click.echo(f"public key   {public}")
    click.echo(f"             {key}")


@command.command(short_help="Say whose signatures you trust.")
@click.argument("key", type=PATH, metavar="[KEY.pub]", required=False)
@click.option("--list", "listing", is_flag=True, help="Print the keys you trust.")
@click.option("--remove", metavar="DIGITS", help="Trust this key no longer.")
def trust(key: Path | None, listing: bool, remove: str | None) -> None:
    """Trust bundles that KEY.pub's owner signed: their plans, native code, are loaded.

    Compare the digits that are printed with the owner's before you rely on them.
    """
    from ..bundle.keys import forget_key, trust_key, trusted_keys

    if (key is not None) + listing + (remove is not None) != 1:
        raise InputError("give one of KEY.pub, --list and --remove DIGITS")
    if key is not None:
        click.echo(f"trusted: {trust_key(key)}")
    elif remove is not None:
        forget_key(remove)
        click.echo(f"no longer trusted: {remove}")
    else:
        for one in trusted_keys():
            click.echo(one)


@command.command(short_help="Bring BUNDLE to a format version that is read here.")
@click.argument("bundle", type=PATH)
def migrate(bundle: Path) -> None:
    """Bring BUNDLE from an older format version to one that is read here, in place."""
    from ..bundle.manifest import PLAIN_VERSION
    from ..bundle.migrate import migrate_bundle

    version = migrate_bundle(bundle)
    if version >= PLAIN_VERSION:
        click.echo(f"{bundle} has format version {version} already")
    else:
        click.echo(f"{bundle}: format version {version} is now {PLAIN_VERSION}")
