"""Load on the served bundled model: 200 jobs of 20 clients, and eight jobs as a batch or one by one.

    python benchmarks/serving.py            the load: nothing lost, nothing doubled, rejections, a live loop
    python benchmarks/serving.py --minutes 20    go on so long, and show how memory moves
    python benchmarks/serving.py --parts load    only this; load, batch, memory

Prints figures and fails when one is outside what the server promises. Loopback only. The clients share one
event loop; how late that is stands beside the rejections, which it makes look longer than they are.
"""

import argparse
import asyncio
import io
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import httpx
from PIL import Image

PORT, STEPS, SIZE = 7899, 2, [64, 64]
REJECT_SECONDS, RATIO = 0.050, 1.3
WOKEN, IN_TIME = "imprompt_loop_delay_seconds_count", 'imprompt_loop_delay_seconds_bucket{le="0.05"}'
MEMORY = {"server": "process_resident_memory_bytes", "worker": 'imprompt_worker_memory_bytes{device="auto"}'}


def main() -> int:
    """Run the load; 0 when every promise is kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=0, help="go on so long and watch memory")
    parser.add_argument("--parts", default="load,batch", help="what is measured; default: load,batch")
    args = parser.parse_args()
    parts = set(args.parts.split(",")) | ({"memory"} if args.minutes else set())
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "imprompt.app.cli", "serve", "--port", str(PORT), "--folder", folder]
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            return asyncio.run(measure(args, parts))
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)


async def measure(args: argparse.Namespace, parts: set[str]) -> int:
    """The parts, one after the other; each prints its figures and says whether it kept the promise."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=120) as client:
        await until_ready(client)
        kept = []
        if "load" in parts:
            kept.append(await load(client, args))
        if "batch" in parts:
            kept.append(await batch(client))
        if "memory" in parts:
            kept.append(await memory(client, args.minutes or 3))
    return 0 if all(kept) else 1


async def load(client: httpx.AsyncClient, args: argparse.Namespace) -> bool:
    """Many clients at once: nothing lost or doubled, a full queue says so at once, the loop stays alive."""
    before = await metrics(client)
    late: list[float] = []
    watching = asyncio.create_task(watch(late))
    start = time.perf_counter()
    found = await asyncio.gather(*(one_client(n, args) for n in range(args.clients)))
    seconds = time.perf_counter() - start
    watching.cancel()
    after = await metrics(client)
    drawn = [job for jobs, _ in found for job in jobs]
    rejected = [delay for _, delays in found for delay in delays]
    history = await all_history(client)
    woken, in_time = (after[name] - before[name] for name in (WOKEN, IN_TIME))
    print(f"{len(drawn)} jobs in {seconds:.1f} s, {len(drawn) / seconds:.2f} a second")
    print(f"lost {args.jobs - len(drawn)}, doubled {len(history) - len(set(history))}")
    print(f"{len(rejected)} rejections, {spread(rejected)} (p99 at most {REJECT_SECONDS * 1000:g} ms)")
    print(f"the clients' own event loop was late by {spread(late)}")
    print(f"the server's was more than 50 ms late {woken - in_time:.0f} times of {woken:.0f}", flush=True)
    return (
        len(drawn) == args.jobs
        and len(history) == len(set(history)) == args.jobs
        and percentile(rejected, 99) < REJECT_SECONDS
        and woken == in_time
    )


async def batch(client: httpx.AsyncClient) -> bool:
    """Whether eight jobs that can be drawn together are drawn faster so."""
    together, alone = await mixed(client)
    ratio = alone / together
    print(f"8 jobs: {alone:.2f} s one by one, {together:.2f} s as a batch: {ratio:.2f}× ({RATIO} at least)")
    return ratio > RATIO


async def watch(late: list[float]) -> None:
    """Note how late this process's event loop wakes up, until cancelled."""
    while True:
        asked = time.perf_counter() + 0.02
        await asyncio.sleep(0.02)
        late.append(time.perf_counter() - asked)


def percentile(seconds: list[float], part: int) -> float:
    return statistics.quantiles(seconds, n=100)[part - 1] if len(seconds) > 1 else 0.0


def spread(seconds: list[float]) -> str:
    return ", ".join(f"p{part} {percentile(seconds, part) * 1000:.1f} ms" for part in (50, 90, 99))


async def metrics(client: httpx.AsyncClient) -> dict[str, float]:
    """What the server tells Prometheus: name with labels → value."""
    lines = (await client.get("/metrics")).text.splitlines()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
    }


async def until_ready(client: httpx.AsyncClient) -> None:
    while True:
        try:
            if (await client.get("/readyz")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.2)


async def one_client(number: int, args: argparse.Namespace) -> tuple[list[str], list[float]]:
    """Submit this client's jobs, wait for all; their ids, and how long each rejection took.

    It tries again at moments of its own: in step, twenty clients of one process would wait for each other.
    """
    headers = {"X-Client-Id": f"client-{number}"}
    pause = random.Random(number)
    ids: list[str] = []
    rejections: list[float] = []
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=120, headers=headers) as client:
        for index in range(number, args.jobs, args.clients):
            fields = {"prompt": "a cat", "steps": STEPS, "size": SIZE, "seed": index}
            while True:
                start = time.perf_counter()
                answer = await client.post("/api/v1/jobs", json={"request": fields})
                if answer.status_code == 202:
                    ids.append(answer.json()["id"])
                    break
                assert answer.status_code == 429, answer.text
                rejections.append(time.perf_counter() - start)
                await asyncio.sleep(pause.uniform(0.2, 0.8))
        return [job for job in ids if await is_done(client, job)], rejections


async def is_done(client: httpx.AsyncClient, job: str) -> bool:
    while True:
        state = (await client.get(f"/api/v1/jobs/{job}")).json()["state"]
        if state in ("done", "failed", "cancelled"):
            return state == "done"
        await asyncio.sleep(0.2)


async def all_history(client: httpx.AsyncClient) -> list[str]:
    ids: list[str] = []
    before = None
    while True:
        page = (
            await client.get(
                "/api/v1/history", params={"limit": 100} | ({"before": before} if before else {})
            )
        ).json()
        ids += [job["id"] for job in page["jobs"]]
        before = page["next"]
        if before is None:
            return ids


async def mixed(client: httpx.AsyncClient) -> tuple[float, float]:
    """Seconds of eight jobs, each with words, a picture, a scale and a seed of its own: as a batch, and one
    after the other."""
    prompts = ("a cat face", "an owl", "a house", "a star", "a rocket", "a bus", "a rose", "a key")
    shown = [await upload(client, (255 - 30 * number, 30 * number, 128)) for number in range(len(prompts))]

    async def submit(number: int) -> str:
        image = {"image": shown[number], "scale": 0.3 + 0.1 * number}
        fields = {"prompt": prompts[number], "steps": 10, "seed": number, "images": [image]}
        return (await client.post("/api/v1/jobs", json={"request": fields})).json()["id"]

    numbers = range(len(prompts))
    for number in numbers:  # so that no measurement encodes pictures
        await is_done(client, await submit(number))
    blocker = (await client.post("/api/v1/jobs", json={"request": {"prompt": "a cat"}})).json()["id"]
    jobs = [await submit(number) for number in numbers]  # they gather while it is drawn
    await is_done(client, blocker)
    start = time.perf_counter()
    for job in jobs:
        await is_done(client, job)
    together = time.perf_counter() - start
    start = time.perf_counter()
    for number in numbers:
        await is_done(client, await submit(number))
    return together, time.perf_counter() - start


async def upload(client: httpx.AsyncClient, colour: tuple[int, int, int]) -> str:
    """The id of a new picture in one colour."""
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(stream, "PNG")
    answer = await client.post("/api/v1/pictures", files={"file": ("a.png", stream.getvalue(), "image/png")})
    return answer.json()["id"]


async def memory(client: httpx.AsyncClient, minutes: float) -> bool:
    """Draw on and sample; whether memory ends within 5 % of where it settled."""
    start, sizes = time.monotonic(), {name: [] for name in MEMORY}
    moments: list[float] = []
    args = argparse.Namespace(jobs=20, clients=4)
    while (passed := (time.monotonic() - start) / 60) < minutes:
        await asyncio.gather(*(one_client(n, args) for n in range(args.clients)))
        now = await metrics(client)
        moments.append(passed)
        for name, metric in MEMORY.items():
            sizes[name].append(now[metric] / 2**20)
        print(", ".join(f"{name} {found[-1]:.0f} MB" for name, found in sizes.items()), flush=True)
    settled = len(moments) // 4
    kept = []
    for name, found in sizes.items():
        slope = statistics.linear_regression(moments[settled:], found[settled:]).slope
        print(f"memory of the {name}: {found[settled]:.0f} to {found[-1]:.0f} MB, {slope:+.2f} MB a minute")
        kept.append(found[-1] < 1.05 * found[settled])
    return all(kept)


if __name__ == "__main__":
    sys.exit(main())
