"""Layer 6: lines that are no text of the document go, and a document whose lines are those of a menu goes as a whole.

Code and markup stay as they are where the language is code.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from corpus.refine.layer import Layer
from corpus.refine.page import CHINESE, CODE, ENGLISH, Page

_BULLETS = frozenset("-•*·–")
# What ends a sentence or a line of text, in both scripts; quotation marks and brackets may follow.
_ENDS = frozenset(".?!\"'\u201d\u2019:;)。？！”’」』）：；…，、．|")
# A line that is nothing but this is what a page has around its text; of the stripped lines in lower case, each behind a
# line feed: a search goes from one to the next, which a `^` in its place would try at every character.
_FURNITURE = re.compile(
    r"\n(?:(?:please )?(?:enable|turn on|activate) javascript\b.{0,120}|(?:we|this (?:site|website)) uses? cookies?\b.*"
    r"|all rights reserved.{0,100}|(?:copyright )?©.{0,100}|copyright \d{4}.{0,100}|lorem ipsum\b.*"
    r"|(?:read more|continue reading|click here|sign[ -]?in|log[ -]?in|sign[ -]?up|register|subscribe|share this"
    r"|share on \w+|tweet|next|prev(?:ious)?|back to top|skip to (?:main )?content|load more|view all|add to cart"
    r"|\d+ items? in cart)[ .!…»>]*"
    r"|\d[\d,.]*[km]? (?:likes?|views?|comments?|shares?|followers?|retweets?|replies)[ .]*"
    r"|(?:点击(?:这里|此处|查看|下载|进入)|阅读(?:全文|更多|原文)|查看(?:更多|全部|详情)|返回(?:顶部|首页|上一页|列表)"
    r"|[上下]一[页篇章]|加入(?:收藏|购物车)|收藏本[站页]|分享(?:到|至).{0,20}|登录|注册|免费注册|立即(?:注册|下载|购买)"
    r"|扫码关注.{0,20}|关注(?:我们|公众号).{0,20}|设为首页|友情链接|网站地图|联系我们)[ 。！…»>:：]*"
    r"|版权所有.{0,80}|备案号.{0,80}|.{0,4}icp备.{0,80}|责任编辑[:：].{0,20}"
    r"|\d+ ?(?:次阅读|人?评论|个?赞|次浏览)[ 。]*)$",
    re.MULTILINE,
)
# The same, of lines that speak of it anywhere; looked at only where the whole text has one of the words.
_POLICY = re.compile(
    r"\n(?:.{0,60}javascript (?:is|must be|to be) (?:disabled|enabled|required)\b.{0,120}"
    r"|.{0,40}\b(?:terms of (?:use|service)|privacy policy|cookie policy)\b.{0,60})$",
    re.MULTILINE,
)
_POLICY_WORDS = ("javascript", "terms of", "privacy policy", "cookie policy")
LONGEST_FURNITURE = 240


class Lines(Layer):
    name = "lines"
    source = (
        "C4 (arXiv 1910.10683) and RefinedWeb (arXiv 2306.01116, appendix G.2) for lines that go; Gopher's bullets and"
        " ellipses; FineWeb (arXiv 2406.17557) for line ends and short lines, FineWeb-2's cmn_Hani for Chinese"
    )
    thresholds: ClassVar = {
        ENGLISH: {
            "lines that end as text does": 0.12,
            "short lines": (30, 0.67),
            "lines that begin with a bullet": 0.9,
            "lines that end in an ellipsis": 0.3,
            "words in lines that went": 0.2,
        },
        CHINESE: {
            "lines that end as text does": 0.106,
            "short lines": (10, 0.67),
            "lines that begin with a bullet": 0.9,
            "lines that end in an ellipsis": 0.3,
            "words in lines that went": 0.2,
        },
        CODE: {"characters of the longest line": 20_000},
    }

    def judge(self, page: Page) -> str | None:
        if page.language == CODE:
            longest = max(map(len, page.lines))
            return "a line too long" if longest > self.thresholds[CODE]["characters of the longest line"] else None
        limits = self.thresholds[page.language or ENGLISH]
        before = page.n_visible
        if gone := furniture(page):
            # What is left is judged below, so that what was judged is what stays.
            page.text = "".join(line for number, line in enumerate(_with_ends(page.text)) if number not in gone)
            if before - page.n_visible > limits["words in lines that went"] * before:
                return "too much of it is page furniture"
        if not page.n_visible:
            return "nothing but page furniture"
        return self._judge_lines(page.prose_lines, limits)

    def _judge_lines(self, lines: list[str], limits: Mapping[str, Any]) -> str | None:
        n = len(lines)
        # Of one or two lines no share says anything.
        if n < 4:
            return None
        if sum([line[0] in _BULLETS for line in lines]) > limits["lines that begin with a bullet"] * n:
            return "nearly all lines are bullets"
        if sum([line.endswith(("...", "…")) for line in lines]) > limits["lines that end in an ellipsis"] * n:
            return "lines that break off"
        open_lines = [line for line in lines if line[-1] not in _ENDS]
        if n - len(open_lines) < limits["lines that end as text does"] * n:
            return "lines do not end as text does"
        length, share = limits["short lines"]
        # Verse and dialogue have short lines as well, but they end as text does.
        if sum([len(line) <= length for line in open_lines]) > share * n:
            return "short lines"
        return None


def furniture(page: Page) -> set[int]:
    """Numbers of the lines that are page furniture."""
    lower = "\n".join(["", *page.stripped_lines]).lower()
    forms = [_FURNITURE, *([_POLICY] if any(word in lower for word in _POLICY_WORDS) else [])]
    found: set[int] = set()
    for form in forms:
        number = place = 0
        for match in form.finditer(lower):
            number += lower.count("\n", place, match.start())
            place = match.start()
            if 1 < len(page.lines[number]) <= LONGEST_FURNITURE:
                found.add(number)
    return found


def _with_ends(text: str) -> list[str]:
    """The lines of `Page.lines`, each with its end as written."""
    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+$", text)
