from __future__ import annotations

import pytest

from shim.oci.errors import ImageUnsuitable
from shim.oci.gojson import MAX_DOCUMENT_BYTES, MAX_VALUES, dumps, loads

# As docker build wrote it, with CMD ["sh","-c","a && b > c"] and a separator of lines.
DOCKER = (
    rb'{"architecture":"amd64","config":{"Env":["A=\u003ca\u0026b\u003e"],"Cmd":["\u2028","\t"]},'
    rb'"created":"2024-01-01T00:00:00.000000001Z","Memory":9007199254740993,"X":null,'
    b'"name":"J\xc3\xbcrgen"}'
)


def test_what_go_wrote_comes_back_byte_for_byte() -> None:
    assert DOCKER == dumps(loads(DOCKER, name="config"))


def test_members_keep_their_order() -> None:
    assert b'{"b":1,"a":[{}],"B":""}' == dumps(loads(b'{"b":1, "a":[{}],\n"B":""}', name="x"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param(b"", "Invalid JSON", id="empty"),
        pytest.param(b"[]", "expected a JSON object", id="a list"),
        pytest.param(b'"{}"', "expected a JSON object", id="a text"),
        pytest.param(b'{"a":1,"b":{"c":1,"c":1}}', "'c' is there twice", id="duplicate"),
        pytest.param(b'{"a":NaN}', "NaN is not JSON", id="NaN"),
        pytest.param(b'{"a":-Infinity}', "Infinity is not JSON", id="infinity"),
        pytest.param(b'{"a":1e999}', "Invalid JSON", id="infinity in digits"),
        pytest.param(b'{"a":"\\ud800"}', "surrogate", id="half of a pair"),
        pytest.param(b'{"a":"\xff"}', "not UTF-8", id="not UTF-8"),
        pytest.param(b'{"a":' * 300 + b"1" + b"}" * 300, "deep", id="deep objects"),
        pytest.param(b'{"a":' + b"[" * 100_000, "deep", id="very deep lists"),
        pytest.param(b'{"a":' + b"9" * 9999 + b"}", "Invalid JSON", id="huge number"),
        pytest.param(b'{"a":[' + b"0," * MAX_VALUES + b"0]}", "values", id="many values"),
        pytest.param(b'{"a":"' + b"x" * MAX_DOCUMENT_BYTES + b'"}', "longer than", id="long"),
    ],
)
def test_refuses_what_others_could_read_differently(body: bytes, message: str) -> None:
    with pytest.raises(ImageUnsuitable, match=message) as failure:
        loads(body, name="the manifest")
    assert str(failure.value).startswith("the manifest: ")
    assert len(str(failure.value)) < 300
