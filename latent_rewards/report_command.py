"""``latent-rewards report``: what a stored proxy's report says, as text or as a page.

latent-rewards report proxy/
latent-rewards report proxy/ --html page.html
"""

from __future__ import annotations

import argparse
from typing import Any

from latent_rewards.errors import DataError


def add_parser(rooms: Any) -> None:  # noqa: ANN401 - argparse's sub-parsers have no public type
    """Add the command to those of ``latent-rewards``."""
    command = rooms.add_parser(
        "report",
        help="print or draw the report of a stored proxy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("path", metavar="PATH", help="the folder of a proxy, or a hub repository organisation/name")
    command.add_argument(
        "--html", metavar="FILE", help="also draw it: scatter, reliability, learning curve, strangeness"
    )
    command.set_defaults(run=report_command)


def report_command(options: argparse.Namespace) -> int:
    """Print the report, and draw it if asked."""
    from latent_rewards.proxies import RewardProxy, format_report
    from latent_rewards.report import check_page
    from latent_rewards.training.checkpoint import CheckpointError

    check_page(options.html, clips=False)
    try:
        proxy = RewardProxy.from_pretrained(options.path)
    except CheckpointError as error:
        raise DataError(str(error)) from error
    if not proxy.report:
        raise DataError(f"the proxy in {options.path} has no report; only a trained one has")
    print(format_report(proxy.report))
    if options.html:
        from latent_rewards.proxy_page import proxy_page

        print(f"\n{proxy_page(proxy, str(options.path)).save(options.html)}")
    return 0
