// The native API, and nothing else: every call of the page goes through here.

/** An answer that is no success: `code`, `message` and `field` as the server says. */
export class Problem extends Error {
  constructor(status, { code, message, field }, retryAfter) {
    super(message);
    Object.assign(this, { status, code, field, retryAfter });
  }
}

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(`/api/v1${path}`, options);
  } catch {
    const code = options.signal?.aborted ? "aborted" : "offline";
    throw new Problem(0, { code, message: code });
  }
  if (response.status === 204) return null;
  const body = await response.json().catch(() => ({}));
  if (!response.ok) {
    const error = body.error ?? { code: "error", message: response.statusText };
    throw new Problem(response.status, error, Number(response.headers.get("Retry-After")) || null);
  }
  return body;
}

const json = (method, body) => ({ method, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

export const capabilities = () => call("/capabilities");
export const job = (id) => call(`/jobs/${id}`);
export const cancel = (id) => call(`/jobs/${id}`, { method: "DELETE" });
export const history = (before) => call(`/history?limit=24${before ? `&before=${before}` : ""}`);
export const forget = (id) => call(`/history/${id}`, { method: "DELETE" });
export const controlMap = (kind, picture) => call("/maps", json("POST", { kind, picture }));

/** Those of these pictures that the server has no longer. */
export async function missing(ids) {
  const found = await Promise.all(ids.map(async (id) => {
    const response = await fetch(`/api/v1/pictures/${id}`, { method: "HEAD" }).catch(() => {
      throw new Problem(0, { code: "offline", message: "offline" });
    });
    if (!response.ok && response.status !== 404) throw new Problem(response.status, { code: "error", message: response.statusText });
    return response.ok ? [] : [id];
  }));
  return found.flat();
}

/** Upload a picture; resolves to what the server knows of it. `signal` gives it up: the problem is "aborted" then. */
export function upload(blob, name = "picture.png", signal = null) {
  const form = new FormData();
  form.append("file", blob, name);
  return call("/pictures", { method: "POST", body: form, signal });
}

/** Submit a request; waits and tries again when the queue is full, unless `signal` says that it is not wanted. */
export async function submit(request, onwait, signal) {
  const key = crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`;
  const options = json("POST", { request });
  options.headers["Idempotency-Key"] = key;
  for (let attempt = 0; ; attempt += 1) {
    try {
      return await call("/jobs", options);
    } catch (problem) {
      if (problem.status !== 429 || attempt === 20) throw problem;
      onwait?.(problem);
      await new Promise((done, stop) => {
        setTimeout(done, 1000 * (problem.retryAfter ?? 2));
        signal.addEventListener("abort", () => stop(problem));
      });
    }
  }
}

const OVER = ["done", "failed", "cancelled"];

/** Listen to a job until it is over; `on(name, data)` for each event. Resolves to the finished job. */
export function follow(id, on) {
  return new Promise((resolve, reject) => {
    let lost = 0;
    let source;
    const heard = (name, data) => {
      lost = 0;
      on(name, data);
      if (!OVER.includes(name)) return;
      source.close();
      resolve(data);
    };
    const listen = () => {
      source = new EventSource(`/api/v1/jobs/${id}/events`);
      for (const name of ["queued", "step", ...OVER]) source.addEventListener(name, (event) => heard(name, JSON.parse(event.data)));
      source.addEventListener("error", failed);
    };
    // It connects again by itself, also over a restart of the server, but not after an answer other than 200.
    const failed = async () => {
      lost += 1;
      if (lost === 30) {
        source.close();
        reject(new Problem(0, { code: "offline", message: "offline" }));
        return;
      }
      on("lost");
      if (source.readyState === EventSource.CLOSED) {
        try {
          const now = await job(id);
          heard(now.state === "running" ? "step" : now.state, now);
          if (OVER.includes(now.state)) return;
        } catch (problem) {
          if (problem.status && problem.status < 500) return reject(problem);
        }
        setTimeout(listen, 1000);
      }
    };
    listen();
  });
}
