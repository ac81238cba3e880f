"""Load on the served bundled model: 200 jobs of 20 clients, and eight jobs as a batch or one by one.

    python benchmarks/serving.py            the load: nothing lost, nothing doubled, rejections, a live loop
    python benchmarks/serving.py --minutes 20    go on so long, and show how memory moves

Prints figures and fails when one is outside what the server promises. Loopback only.
"""

import argparse
import asyncio
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import httpx

PORT, STEPS, SIZE = 7899, 2, [64, 64]
REJECT_SECONDS, RATIO = 0.050, 1.3
IN_TIME = 'imprompt_loop_delay_seconds_bucket{le="0.05"}'


def main() -> int:
    """Run the load; 0 when every promise is kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=0, help="go on so long and watch memory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "imprompt.app.cli", "serve", "--port", str(PORT), "--folder", folder]
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            return asyncio.run(load(args))
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)


async def load(args: argparse.Namespace) -> int:
    """All measurements, one after the other."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=120) as client:
        await until_ready(client)
        before = await metrics(client)
        start = time.perf_counter()
        found = await asyncio.gather(*(one_client(n, args) for n in range(args.clients)))
        seconds = time.perf_counter() - start
        after = await metrics(client)
        drawn = [job for jobs, _ in found for job in jobs]
        rejected = [delay for _, delays in found for delay in delays]
        history = await all_history(client)
        together, alone = await mixed(client)
        settled = await memory(client, args.minutes) if args.minutes else True
    woken, in_time = (after[name] - before[name] for name in ("imprompt_loop_delay_seconds_count", IN_TIME))
    p99 = statistics.quantiles(rejected, n=100)[98] if len(rejected) > 1 else 0.0
    ratio = alone / together
    print(f"{len(drawn)} jobs in {seconds:.1f} s, {len(drawn) / seconds:.2f} a second")
    print(f"lost {args.jobs - len(drawn)}, doubled {len(history) - len(set(history))}")
    print(f"{len(rejected)} rejections, p99 {p99 * 1000:.1f} ms (at most {REJECT_SECONDS * 1000:g})")
    print(f"event loop more than 50 ms late {woken - in_time:.0f} times of {woken:.0f}")
    print(f"8 jobs: {alone:.2f} s one by one, {together:.2f} s as a batch: {ratio:.2f}× ({RATIO} at least)")
    kept = [
        len(drawn) == args.jobs,
        len(history) == len(set(history)) == args.jobs,
        p99 < REJECT_SECONDS,
        woken == in_time,
        ratio > RATIO,
        settled,
    ]
    return 0 if all(kept) else 1


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
    """Submit this client's jobs, wait for all; their ids, and how long each rejection took."""
    headers = {"X-Client-Id": f"client-{number}"}
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
                await asyncio.sleep(0.5)
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
    """Seconds of eight jobs with prompts of their own, submitted at once and one after the other."""
    prompts = ("a cat face", "an owl", "a house", "a star", "a rocket", "a bus", "a rose", "a key")

    async def submit(seed: int, prompt: str) -> str:
        fields = {"prompt": prompt, "steps": 10, "seed": seed}
        return (await client.post("/api/v1/jobs", json={"request": fields})).json()["id"]

    blocker = await submit(0, "a cat")  # while it is drawn, the others gather
    start = time.perf_counter()
    jobs = [await submit(seed, prompt) for seed, prompt in enumerate(prompts, 1)]
    await is_done(client, blocker)
    start = time.perf_counter()
    for job in jobs:
        await is_done(client, job)
    together = time.perf_counter() - start
    start = time.perf_counter()
    for seed, prompt in enumerate(prompts, 1):
        await is_done(client, await submit(seed, prompt))
    return together, time.perf_counter() - start


async def memory(client: httpx.AsyncClient, minutes: float) -> bool:
    """Draw on and watch the worker's memory; whether it ends within 5 % of where it was after a tenth."""
    end, sizes = time.monotonic() + 60 * minutes, []
    args = argparse.Namespace(jobs=20, clients=4)
    while time.monotonic() < end:
        await asyncio.gather(*(one_client(n, args) for n in range(args.clients)))
        sizes.append((await metrics(client))['imprompt_worker_memory_bytes{device="auto"}'])
        print(f"worker memory {sizes[-1] / 2**20:.0f} MB", flush=True)
    return sizes[-1] < 1.05 * sizes[len(sizes) // 10]


if __name__ == "__main__":
    sys.exit(main())
