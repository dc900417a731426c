"""Documents of S3 and of those who imitate it."""

from __future__ import annotations

from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shim.aws.xml import parse
from shim.http.errors import TransportError
from shim.s3.documents import build_complete, parse_page

NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


@pytest.mark.parametrize("attribute", ["", f" {NAMESPACE}"], ids=["bare", "namespace"])
def test_names_lose_their_namespace(attribute: str) -> None:
    root = parse(f"<Error{attribute}><Code>NoSuchKey</Code></Error>".encode())
    assert ("Error", "NoSuchKey", "") == (root.name, root.find("Code"), root.find("Message"))


def test_blanks_before_the_declaration_are_allowed() -> None:
    assert "a" == parse(b'\n\n <?xml version="1.0"?><a/>').name


BILLION_LAUGHS = b'<!DOCTYPE a [<!ENTITY b "xxxx"><!ENTITY c "&b;&b;&b;">]><a>&c;</a>'
MALFORMED = {
    "nothing": b"",
    "blanks": b"  \n ",
    "HTML": b"<html><br></html>",
    "torn": b"<ListBucketResult><Contents>",
    "not UTF-8": b"<a>\xff</a>",
    "a document type": BILLION_LAUGHS,
    "an outside entity": b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
}


@pytest.mark.parametrize("document", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_document_of_s3_is_refused(document: bytes) -> None:
    with pytest.raises(TransportError):
        parse(document)


def page(keys: list[str], *, encoding: bool, truncated: str = "false", token: str = "") -> bytes:
    contents = "".join(f"<Contents><Key>{key}</Key><Size>3</Size></Contents>" for key in keys)
    declared = "<EncodingType>url</EncodingType>" if encoding else ""
    return (
        f"<ListBucketResult {NAMESPACE}>{declared}<IsTruncated>{truncated}</IsTruncated>{contents}"
        f"<NextContinuationToken>{token}</NextContinuationToken></ListBucketResult>"
    ).encode()


@settings(max_examples=50)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=5))
def test_keys_survive_either_way_of_url_encoding(keys: list[str]) -> None:
    expected = tuple((key, 3) for key in keys)
    for encode in (quote_plus, quote):
        document = page([encode(key) for key in keys], encoding=True)
        assert expected == parse_page(document).objects


def test_keys_are_left_alone_where_no_encoding_is_declared() -> None:
    assert (("a+b%20c", 3),) == parse_page(page(["a+b%20c"], encoding=False)).objects


def test_the_token_is_opaque_and_only_that_of_a_page_with_more() -> None:
    assert "a%2Fb+c" == parse_page(page([], encoding=True, truncated="true", token="a%2Fb+c")).token
    assert "" == parse_page(page([], encoding=True, token="left over")).token


@pytest.mark.parametrize(
    "document", [page([], encoding=True, truncated="true"), b"<Error><Code>X</Code></Error>"]
)
def test_a_listing_that_cannot_go_on_is_refused(document: bytes) -> None:
    with pytest.raises(TransportError):
        parse_page(document)


def test_the_list_of_parts_reads_back() -> None:
    root = parse(build_complete([(1, '"a&b<c"', "AAAA=="), (2, '"d"', "")]))
    parts = [
        [part.find(n) for n in ("PartNumber", "ETag", "ChecksumCRC32")] for part in root.children
    ]
    assert [["1", '"a&b<c"', "AAAA=="], ["2", '"d"', ""]] == parts


NOT_XML = [*map(chr, set(range(32)) - {9, 10, 13}), "\ufffe", "\uffff"]


@pytest.mark.parametrize("write", ["{0}", "&#{1};", "&#x{1:x};", "&#x{1:X};", "&#x00{1:x};"])
@pytest.mark.parametrize("character", NOT_XML, ids=ascii)
def test_a_key_that_xml_cannot_hold_spoils_no_answer(character: str, write: str) -> None:
    text = write.format(character, ord(character))
    root = parse(f"<R><Key>a{text}b</Key><UploadId>id</UploadId></R>".encode())
    assert ("a?b", "id") == (root.find("Key"), root.find("UploadId"))


@pytest.mark.parametrize(
    "text", ["&#9;", "&#xA;", "&#xd;", "&#32;", "&#x20;", "&#xfffd;", "&#65533;"]
)
def test_characters_that_xml_can_hold_are_left(text: str) -> None:
    expected = chr(int(text[3:-1], 16) if text[2] == "x" else int(text[2:-1]))
    assert f"a{expected}b" == parse(f"<R><Key>a{text}b</Key></R>".encode()).find("Key")
