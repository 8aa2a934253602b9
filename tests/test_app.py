"""The page in a real browser: an upload, a verdict, a bad file, the report."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"
)


def browser(downloads: Path | None = None):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1600"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(DRIVER))


def assert_no_sideways_scroll(driver) -> None:
    """At a desk's width, and at a phone's, which is below the narrowest window that Chromium opens."""
    for width in (1280, 390):
        metrics = {"width": width, "height": 1600, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert driver.execute_script("return innerWidth") == width
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.fixture(scope="module")
def address():
    """app.py on a free port, as anyone starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(HERE / "app.py"), "--port", str(port)]
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"}
    server = subprocess.Popen(command, cwd=HERE, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(url).close()
                break
            except OSError:
                assert server.poll() is None, "app.py ended"
                time.sleep(1)
        yield url
    finally:
        server.terminate()
        server.wait(20)


def test_upload_verdict_and_bad_file(address, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    bad = tmp_path / "<b>not an image.png"
    bad.write_text("<html>no</html>")
    driver = browser()
    try:
        driver.get(address)
        wait = WebDriverWait(driver, 60, poll_frequency=0.02)
        upload = wait.until(lambda d: d.find_element(By.CSS_SELECTOR, "#images input[type=file]"))
        upload.send_keys(f"{HERE / 'examples' / 'ldm_1.png'}\n{bad}")
        wait.until(lambda d: "ldm_1" in d.find_element(By.ID, "images").text)
        driver.find_element(By.ID, "examine").click()
        moves = ("Examining image", "Drawing the report")
        wait.until(lambda d: any(word in d.find_element(By.ID, "results").text for word in moves))
        wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, "#report a"))
        results = driver.find_element(By.ID, "results").text
        assert any(word in results for word in ("a camera", "generated, by", "can't tell"))
        assert "could not be examined" in results
        assert "the file makes no claim of its origin" in results
        assert "attention over timesteps" not in results  # folded
        assert_no_sideways_scroll(driver)
        report = driver.find_element(By.CSS_SELECTOR, "#report a").get_attribute("href")
        page = urllib.request.urlopen(report).read().decode()
        assert "To repeat this examination" in page
        assert str(tmp_path) not in results
    finally:
        driver.quit()


def test_report_opens_without_a_console_error(tmp_path):
    report = tmp_path / "report.html"
    files = sorted((HERE / "examples").glob("*.png"))[:2]
    command = [sys.executable, "-m", "protoleak.cli", "report", *map(str, files)]
    subprocess.run([*command, "--output", str(report)], check=True, cwd=tmp_path)
    driver = browser()
    try:
        driver.get(report.as_uri())
        script = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
        assert driver.execute_script("return document.images.length") > 10
        assert driver.execute_script(script) == 0  # every picture and drawing is shown
        assert driver.get_log("browser") == []
        assert_no_sideways_scroll(driver)
        driver.save_screenshot(str(tmp_path / "report.png"))
    finally:
        driver.quit()
