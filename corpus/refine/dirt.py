"""Documents that a cascade should catch, made from clean ones: what it is measured and tested on.

Every document says in its field `dirt` how it was spoilt; `corpus.refine` carries the field along, so that a count over
kept/ and dropped/ tells what was caught. Made by the hash of the clean text: always the same.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from corpus.readers import Document
from corpus.refine.hashing import text_hash
from corpus.refine.personal_data import is_card_number, is_identity_number
from corpus.refine.shards import writing
from corpus.sources import read_paths
from foundation.numbers import check_numbers

SENTENCES = {
    "fr": (
        "Le conseil municipal se réunit ce soir pour voter le budget de la ville.",
        "Elle regardait par la fenêtre les enfants qui jouaient dans la cour.",
        "Nous avons pris le train de nuit et nous sommes arrivés avant l'aube.",
        "Les prix du marché ont beaucoup augmenté depuis le début de l'année.",
        "Il faut encore attendre quelques jours avant de connaître les résultats.",
    ),
    "ru": (
        "Сегодня утром в городе прошёл сильный дождь, и улицы были пусты.",
        "Он долго искал старую книгу, которую читал ещё в детстве.",
        "Поезд опоздал на два часа, но никто не стал жаловаться.",
        "Учёные сообщили о новых результатах своего исследования.",
        "Мы договорились встретиться у входа в театр в семь часов.",
    ),
    "ja": (
        "昨日は友だちと一緒に新しい映画を見に行きました。",
        "この町には古いお寺がたくさんあって、とても静かです。",
        "電車が遅れたので、会議に間に合いませんでした。",
        "来週の日曜日に家族で海へ出かけるつもりです。",
        "彼は毎朝早く起きて、庭の花に水をやっています。",
    ),
}
SPAM = {
    "en": (
        *(
            "Best online casino with free spins and casino bonus every day!",
            "Try our slot machines and sports betting now.",
        ),
        *("Buy pills without prescription, viagra and cialis cheap.", "Hot webcam sex and adult videos, xxx porn."),
    ),
    "zh": (
        *("澳门新葡京真人娱乐，百家乐老虎机天天送彩金。", "时时彩六合彩彩票平台，博彩首选，注册就送。"),
        *("激情视频成人电影免费看，一夜情约炮加微信。", "代开发票，办证刻章，贷款秒批，高仿手表批发。"),
    ),
}
MENU = {
    "en": ("Home", "About us", "Contact", "Products", "Read more", "Sign in", "Next", "Cart", "Search", "Blog", "News"),
    "zh": (
        "首页",
        "关于我们",
        "产品中心",
        "上一页",
        "下一页",
        "登录",
        "注册",
        "新闻动态",
        "网站地图",
        "友情链接",
        "更多",
    ),
}
FLOOD = {
    "en": (
        *(
            "The roof of the house in {a} had lost its tiles in the storm.",
            "A roofer from {a} came to look at the gutters.",
        ),
        *(
            "With new tiles the roof will be dry for thirty years, says {a}.",
            "Gutters that leak are the work of {a} roofers.",
        ),
        *("Have you looked at your roof lately, {a}?", "Tiles of slate and clay are what {a} lays on every roof."),
        *(
            "In {a} there is no better team for roofs and gutters.",
            "The repair of a roof takes {a} no more than two days.",
        ),
        *(
            "Rain runs from the tiles into the gutters that {a} has mounted.",
            "It was {a} who found the leak in the roof.",
        ),
        *(
            "Ask {a} what a new roof with tiles and gutters costs.",
            "A roof is only as good as the tiles that {a} chose.",
        ),
    ),
    "zh": (
        *("{a}的师傅把家具包好，一件一件搬上了货车。", "搬家之前请先把箱子装好，{a}会派车来接。"),
        *("这家{a}搬家公司从不在路上加价。", "长途搬家要用大货车，{a}有三十多辆。"),
        *("钢琴和冰箱都由{a}专门的人来搬。", "箱子、绳子和打包用的纸都由{a}送来。"),
        *("搬家的日子定了以后，请给{a}留一个地址。", "货车开到楼下，{a}的人就把家具抬了下来。"),
        *("{a}说，搬家最怕的是把箱子弄丢。", "在这里搬家的人都知道{a}。"),
        *("家具坏了怎么办？{a}会照价赔。", "打包、装车、运输，{a}一天就能做完。"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class DirtConfig:
    """Spoil clean documents in every way that the cascade should notice.

    Attributes:
        data: Clean documents.
        out: The .jsonl file to write.
        text_field: Key or column that holds the text.
        each: Documents of each kind and language.
    """

    data: tuple[str, ...]
    out: Path
    text_field: str = "text"
    each: int = 20

    def __post_init__(self) -> None:
        check_numbers(self, each=1)


def _latin1(text: str, _: random.Random) -> str:
    return text.encode().decode("latin-1")


def _gbk_as_latin1(text: str, _: random.Random) -> str:
    return text.encode("gb18030").decode("latin-1")


def _utf8_as_gbk(text: str, _: random.Random) -> str:
    return text.encode().decode("gb18030", "replace")


def _replaced(text: str, rng: random.Random) -> str:
    return "".join("\ufffd" if rng.random() < 0.03 else character for character in text)


def _shuffled(text: str, rng: random.Random) -> str:
    characters = list(text)
    rng.shuffle(characters)
    return "".join(characters)


def _short(text: str, _: random.Random) -> str:
    return text[:60]


def _copy(text: str, _: random.Random) -> str:
    return "\ufeff" + text.replace("\r\n", "\n").replace("\n", "\r\n")


def near_copy(text: str, rng: random.Random) -> str:
    """One place in two hundred changed: a Jaccard similarity of 5-grams of about 0.95."""
    words = text.split(" ") if text.count(" ") * 12 > len(text) else list(text)
    joint = " " if text.count(" ") * 12 > len(text) else ""
    for _ in range(max(len(words) // 200, 1)):
        words[rng.randrange(len(words))] = rng.choice(words)
    return joint.join(words)


def _of_parts(parts: tuple[str, ...], joint: str, n: int) -> Callable[[str, random.Random], str]:
    return lambda _, rng: joint.join(rng.choice(parts) for _ in range(n))


def _repeated(text: str, _: random.Random) -> str:
    return (text[:120] + " ") * 30


def _digits(_: str, rng: random.Random) -> str:
    return "\n".join("  ".join(f"{rng.random() * 1000:.4f}" for _ in range(6)) for _ in range(60))


def _flood(language: str) -> Callable[[str, random.Random], str]:
    """No two alike in five words or characters running, or hardly, and all of one topic."""
    syllables = (
        ["ka", "mo", "ri", "le", "sa", "tu", "be", "no", "di", "fa", "gu"]
        if language == "en"
        else "东西南北江河山海春夏秋冬金木水火土云风雨"
    )

    def made(_: str, rng: random.Random) -> str:
        sentences = rng.sample(FLOOD[language], 8)
        names = ("".join(rng.choice(syllables) for _ in range(3)).title() for _ in sentences)
        return (" " if language == "en" else "").join(form.format(a=name) for form, name in zip(sentences, names))

    return made


def personal(text: str, rng: random.Random) -> str:
    """The text with one of each kind of personal data behind its first line, and a price and a date beside them."""
    head, _, tail = text.partition("\n")
    return f"{head}\n{' '.join(personal_data(rng).values())} 2024-03-15 $1,299.00 128.50\n{tail}"


def personal_data(rng: random.Random) -> dict[str, str]:
    """Made-up personal data, by the kind of its mask; check digits hold."""
    day = f"19{rng.randint(50, 99)}{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}"
    identity = next(
        number for check in "0123456789X" if is_identity_number(number := f"110105{day}{rng.randint(0, 0):03d}{check}")
    )
    card = f"4{rng.randrange(10**14):014d}"
    card = next(card + digit for digit in "0123456789" if is_card_number(card + digit))
    return {
        "EMAIL": f"li.{rng.randint(1, 999)}@post.example.org",
        "PHONE": f"1{rng.choice('3578')}{rng.randrange(10**9):09d}",
        "ID_NUMBER": identity,
        "CARD_NUMBER": card,
        "IP_ADDRESS": f"{rng.randint(50, 90)}.{rng.randint(1, 250)}.{rng.randint(1, 250)}.{rng.randint(1, 250)}",
    }


# By language of the clean text: kind and how it is made. `personal` is to be kept, and masked.
KINDS: dict[str, dict[str, Callable[[str, random.Random], str]]] = {
    "en": {
        **{"replaced": _replaced, "shuffled": _shuffled, "short": _short, "copy": _copy, "near_copy": near_copy},
        **{"repeated": _repeated, "digits": _digits, "personal": personal, "blocked": lambda text, _: text},
        **{f"foreign_{code}": _of_parts(parts, " ", 12) for code, parts in SENTENCES.items()},
        **{"spam": _of_parts(SPAM["en"], " ", 12), "menu": _of_parts(MENU["en"], "\n", 60), "flood": _flood("en")},
    },
    "zh": {
        **{"utf8_as_latin1": _latin1, "gbk_as_latin1": _gbk_as_latin1, "utf8_as_gbk": _utf8_as_gbk},
        **{"replaced": _replaced, "shuffled": _shuffled, "short": lambda text, _: text[:20], "copy": _copy},
        **{"near_copy": near_copy, "repeated": _repeated, "personal": personal, "blocked": lambda text, _: text},
        **{"spam": _of_parts(SPAM["zh"], "", 12), "menu": _of_parts(MENU["zh"], "\n", 60), "flood": _flood("zh")},
    },
}
# Of this kind this many times as many are made.
FLOODED = 8
LONGEST = 20_000


def spoil(config: DirtConfig) -> dict[str, int]:
    """Writes `config.out`.

    Returns:
        how many documents of each kind, as `<language> <kind>`.

    Raises:
        ValueError: where the data has no document of 200 characters or more in one of the languages.
    """
    clean: dict[str, list[str]] = {"en": [], "zh": []}
    for item in read_paths(config.data, text_field=config.text_field):
        if isinstance(item, Document) and len(item.text) >= 200:
            han = sum("\u4e00" <= character <= "\u9fff" for character in item.text[:1000])
            share = han / max(len(item.text[:1000]), 1)
            # Half Chinese, half code would leave either open.
            if share > 0.4 or han == 0:
                clean["zh" if han else "en"].append(item.text[:LONGEST])
    counts: dict[str, int] = {}
    with writing(config.out) as out:
        for language, texts in clean.items():
            if not texts:
                raise ValueError(f"no clean document of language {language} in {', '.join(config.data)}")
            texts.sort(key=text_hash)
            for kind, document in _spoilt(language, texts, config.each):
                out.write(json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
                counts[f"{language} {kind}"] = counts.get(f"{language} {kind}", 0) + 1
    return counts


def _spoilt(language: str, texts: list[str], each: int) -> Iterator[tuple[str, dict[str, str]]]:
    for number, (kind, make) in enumerate(KINDS[language].items()):
        for place in range(each * (FLOODED if kind == "flood" else 1)):
            text = texts[(number * each + place) % len(texts)]
            made = make(text, random.Random(f"{language} {kind} {place} {text_hash(text)}"))
            url = "http://www.online-casino.test/page" if kind == "blocked" else f"http://site{place}.test/{kind}"
            yield kind, {"text": made, "dirt": f"{language} {kind}", "url": url}
