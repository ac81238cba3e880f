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
    throw new Problem(0, { code: "offline", message: "offline" });
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

/** Upload a picture; resolves to what the server knows of it. */
export function upload(blob, name = "picture.png") {
  const form = new FormData();
  form.append("file", blob, name);
  return call("/pictures", { method: "POST", body: form });
}

/** Submit a request; waits and tries again when the queue is full. */
export async function submit(request, onwait) {
  const key = crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`;
  const options = json("POST", { request });
  options.headers["Idempotency-Key"] = key;
  for (let attempt = 0; ; attempt += 1) {
    try {
      return await call("/jobs", options);
    } catch (problem) {
      if (problem.status !== 429 || attempt === 20) throw problem;
      onwait?.(problem);
      await new Promise((done) => setTimeout(done, 1000 * (problem.retryAfter ?? 2)));
    }
  }
}

/** Listen to a job until it is over; `on(name, data)` for each event. Resolves to the finished job. */
export function follow(id, on) {
  return new Promise((resolve, reject) => {
    const source = new EventSource(`/api/v1/jobs/${id}/events`);
    let lost = 0;
    const heard = (name) => (event) => {
      lost = 0;
      const data = JSON.parse(event.data);
      on(name, data);
      if (["done", "failed", "cancelled"].includes(name)) {
        source.close();
        resolve(data);
      }
    };
    for (const name of ["queued", "step", "done", "failed", "cancelled"]) source.addEventListener(name, heard(name));
    source.addEventListener("error", () => {
      lost += 1;
      if (lost < 30) return; // it connects again by itself, also over a restart of the server
      source.close();
      reject(new Problem(0, { code: "offline", message: "offline" }));
    });
  });
}
