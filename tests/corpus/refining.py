"""Text for the tests of `corpus.refine`: English from the standard library's reference pages, Chinese written here, and
the shared development corpus where there is one."""

import gzip
import json
import os
import random
import re
from pathlib import Path
from pydoc_data.topics import topics

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHINESE = (
    *("春天来了，河边的柳树发出了新芽，孩子们在草地上放风筝。", "图书馆每天早上八点开门，读者可以在那里安静地看书。"),
    *("这座桥建于三百年前，是用当地的青石砌成的，至今仍然很坚固。", "科学家发现，海水的温度在过去几十年里一直在上升。"),
    *("他把信放进抽屉，锁好门，然后慢慢走下楼去。", "编写程序的时候，应当先想清楚数据从哪里来，到哪里去。"),
    *("市场上的蔬菜很新鲜，价格也不贵，所以买的人很多。", "老师告诉我们，学习语言最好的办法是每天都说一点。"),
    *("山上的雪化了，溪水流得更急，磨坊又开始转动起来。", "如果天气好的话，我们明天一早就出发，中午之前可以到达。"),
    *("这本书讲的是一个渔夫和他的儿子在海上遇到风暴的故事。", "医生说病人已经好多了，再休息几天就可以回家。"),
    *("城里新开了一条地铁线，从火车站到大学只要二十分钟。", "农民把收下来的麦子晒在院子里，鸡在旁边走来走去。"),
    *("系统启动以后会先检查硬盘，然后再加载其他的服务。", "她小时候住在南方，所以对下雨的声音有一种特别的感情。"),
    *("会议开了一个下午，大家还是没有得出一致的意见。", "月亮升起来了，湖面上闪着银色的光，远处传来笛声。"),
    *("数学家用一个简单的例子说明了这个定理为什么成立。", "为了保护森林，政府规定这个地区在十年之内不许砍树。"),
)


def english() -> list[str]:
    """Some 150 pages of real prose, without the tables and listings that a web filter takes for dirt."""
    found = []
    for text in topics.values():
        parts = [part for part in re.split(r"\n\n+", text) if len(part.split()) > 25 and "::" not in part]
        found += ["\n\n".join(parts[start : start + 4]) for start in range(0, len(parts) - 3, 4)]
    return sorted(set(found))


def chinese(count: int, seed: int = 0) -> list[str]:
    """Documents of some 300 characters, no two of them alike in three sentences running, or hardly."""
    rng = random.Random(seed)
    drawn = [rng.sample(CHINESE, 12) for _ in range(count)]
    return ["\n\n".join("".join(sentences[start : start + 4]) for start in (0, 4, 8)) for sentences in drawn]


def write_jsonl(path: Path, documents) -> Path:
    """One document a line; a string is a document of nothing but text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"text": document} if isinstance(document, str) else document for document in documents]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read_out(folder: Path, name: str) -> list[dict]:
    return [
        json.loads(line)
        for path in sorted((folder / name).glob("*.gz"))
        for line in gzip.open(path, "rt", encoding="utf-8")
    ]


def shared(*parts: str) -> Path:
    """A file or folder of the shared development data; without it the test is skipped by name."""
    path = Path(os.environ.get("HYBRID_MOE_SHARED", ROOT.parent / "shared")).joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs the shared development data ({'/'.join(parts)}): set HYBRID_MOE_SHARED to its folder")
    return path
