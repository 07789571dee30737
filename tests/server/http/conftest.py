import httpx
import openai
import pytest

from tests.server.http.scripted import RunningServer


@pytest.fixture
def server():
    with RunningServer() as running:
        yield running


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client
