// The big picture: welcome and examples, a drawing in progress, what came of it, and the A/B comparison.

import { cancel, follow, forget, job as jobState, submit } from "./api.js";
import { $, announce, calm, h, icon, refill, toast } from "./dom.js";
import { t } from "./i18n.js";
import { tell } from "./references.js";

const RUN = "imprompt.run"; // kept for the tab: another one has its own

/** Cells of the present run: `{ label, job, state, element }`; whether it is still going on, and who stops it. */
let cells = [];
let running = false;
let stopper = null;
let actions = null; // what can be done with a finished picture, set by main.js
let onstate = () => {};
let again = () => {}; // shows once more what is shown, in another language

export const isRunning = () => running;
export const refresh = () => again();
export function setUp(handlers) {
  ({ actions, onstate } = handlers);
}

// ---- welcome

/** What the page is for, shown by examples: a picture and words, and what becomes of them. */
export function welcome(examples, use) {
  again = () => welcome(examples, use);
  refill($("stage"), [h("div", { class: "welcome" },
    h("h2", {}, t("motto")), h("p", {}, t("welcomeText")),
    h("ul", { class: "examples" }, examples.map((example) => h("li", {},
      h("button", { type: "button", class: "example", onclick: () => use(example) },
        h("span", { class: "sum" },
          example.picture && h("span", { class: "part" }, h("img", { src: example.picture, alt: t("exampleShown") })),
          example.picture && h("span", { class: "sign", "aria-hidden": "true" }, "+"),
          h("span", { class: "part words" }, `“${example.text}”`),
          h("span", { class: "sign", "aria-hidden": "true" }, "→"),
          h("span", { class: "part" }, h("img", { src: example.drawn, alt: t("exampleDrawn") }))),
        h("span", { class: "example-text" }, h("strong", {}, t(example.title)), h("span", { class: "try" }, icon("picture"), t("tryIt"))))))))]);
}

// ---- drawing

/** Draw requests: `[{ request, label }]`. Resolves when all are over. */
export async function draw(wanted) {
  cells = wanted.map(({ label }) => ({ label, job: null, pictures: [] }));
  begin();
  const jobs = await Promise.all(wanted.map(async ({ request }, place) => {
    try {
      const job = await submit(request, () => progress(cells[place], t("busy")), stopper.signal);
      cells[place].job = job;
      if (stopper.signal.aborted) cancelled(job); // stopped before it was accepted
      return job;
    } catch (problem) {
      if (stopper.signal.aborted) stopped(cells[place]);
      else failed(cells[place], problem);
      return null;
    }
  }));
  sessionStorage.setItem(RUN, JSON.stringify(cells.filter((cell) => cell.job).map((cell) => ({ id: cell.job.id, label: cell.label }))));
  await listen(jobs);
}

/** Take up the run that was going on when this tab left the page, also if it is over by now. */
export async function resume() {
  let kept = [];
  try {
    kept = JSON.parse(sessionStorage.getItem(RUN) ?? "[]");
  } catch { /* nothing kept */ }
  const found = await Promise.all(kept.map(async ({ id, label }) => ({ label, job: await jobState(id).catch(() => null), pictures: [] })));
  const known = found.filter(({ job }) => job && job.state !== "cancelled");
  if (running || !known.length) return;
  cells = known;
  begin();
  await listen(cells.map(({ job }) => job));
}

async function listen(jobs) {
  await Promise.all(jobs.map((job, place) => job && watch(cells[place], job)));
  sessionStorage.removeItem(RUN);
  running = false;
  onstate(false, cells.some((cell) => cell.pictures.length));
  const finished = cells.filter((cell) => cell.pictures.length);
  if (finished.length) {
    announce(t("done"));
    if (cells.length === 1 && cells[0].pictures.length === 1) show(cells[0].job, 0);
  } else if (cells.every((cell) => cell.stopped)) announce(t("cancelled"));
}

async function watch(cell, job) {
  try {
    cell.job = await follow(job.id, (name, data) => {
      if (name === "queued") progress(cell, data.position ? t("ahead", { count: data.position }) : t("waiting"), null, data.estimate);
      else if (name === "step" && data.steps) {
        progress(cell, t("step", data), data.step / data.steps, data.estimate);
        if (data.preview) cell.image.src = data.preview;
        cell.image.hidden = !cell.image.src;
      } else if (name === "step") progress(cell, t("loading"));
      else if (name === "lost") progress(cell, t("lost"));
    });
    if (cell.job.state === "done") finished(cell);
    else if (cell.job.state === "failed") failed(cell, cell.job.error);
    else stopped(cell);
  } catch (problem) {
    failed(cell, problem);
  }
}

function begin() {
  running = true;
  again = () => {};
  stopper = new AbortController();
  onstate(true, false);
  for (const cell of cells) {
    cell.image = h("img", { alt: "", class: "preview", hidden: true });
    cell.bar = h("progress", { max: 1, "aria-label": cell.label ?? t("stage") });
    cell.text = h("span", { class: "progress-text" }, t("waiting"));
    cell.frame = h("div", { class: "frame" }, cell.image, h("span", { class: "shimmer" }));
    cell.element = h("figure", { class: "cell" }, cell.frame, h("figcaption", {},
      cell.label && h("strong", {}, cell.label), cell.bar, cell.text));
  }
  const form = cells.length > 1 ? "cells grid" : "cells";
  refill($("stage"), [h("div", { class: form }, cells.map((cell) => cell.element))]);
  if (innerWidth < 900) $("stage").scrollIntoView({ block: "start", behavior: calm() ? "auto" : "smooth" });
}

function progress(cell, text, part = null, seconds = null) {
  if (part === null) cell.bar.removeAttribute("value");
  else cell.bar.value = part;
  cell.text.textContent = seconds ? `${text} · ${t("estimate", { seconds: Math.ceil(seconds) })}` : text;
  if (part === null || Math.round(part * 100) % 25 === 0) announce(text);
}

function finished(cell) {
  cell.pictures = cell.job.pictures;
  if (cells.length === 1 && cell.pictures.length === 1) return;
  cell.element.replaceChildren(
    h("div", { class: cell.pictures.length > 1 ? "cells grid" : "frame" }, cell.pictures.map((picture, place) =>
      h("button", { type: "button", class: "tile", "aria-label": cell.label ?? t("picture", { number: place + 1 }), onclick: () => show(cell.job, place) },
        h("img", { src: picture.url, alt: "" })))),
    cell.label ? h("figcaption", {}, h("strong", {}, cell.label)) : "");
}

function failed(cell, problem) {
  cell.element.replaceChildren(h("div", { class: "frame empty" }, icon("x")), h("figcaption", {}, problem.message === "offline" ? t("offline") : problem.message));
  tell(problem);
}

function stopped(cell) {
  cell.stopped = true;
  cell.element.replaceChildren(h("div", { class: "frame empty" }, icon("x")), h("figcaption", {}, t("cancelled")));
}

/** Stop the present run; it is over when the server says so of each of its jobs. */
export async function stop() {
  if (stopper.signal.aborted) return;
  stopper.abort();
  await Promise.all(cells.filter((cell) => cell.job && !cell.pictures.length).map((cell) => cancelled(cell.job)));
}

async function cancelled(job) {
  try {
    await cancel(job.id);
  } catch (problem) {
    if (problem.code === "finished") return;
    tell(problem);
    stopper = new AbortController(); // it goes on, and can be stopped again
  }
}

// ---- one picture

/** What tells a picture from another of the same words. */
export const numbered = (job, place) => `${title(job)} · ${t("seed")} ${job.request.seed + place}`;
const title = (job) => job.request.prompt || t("withoutWords");

/** A note in which the pictures that were shown have the names that they have on the page, for ids say nothing. */
const named = (note, { images }) => note.replace(/'([0-9a-f]{12})…'/g, (said, id) => {
  const place = images.findIndex(({ image }) => [image].flat().some((one) => one?.startsWith(id)));
  return place < 0 ? said : t("picture", { number: place + 1 });
});

/** Show picture `place` of a finished job with what can be done with it. */
export function show(job, place = 0) {
  again = () => show(job, place);
  const picture = job.pictures[place];
  const other = job.request.image ? `/api/v1/pictures/${job.request.image}` : null;
  const grid = cells.length > 1 && cells.some((cell) => cell.job?.id === job.id && cell.pictures.length);
  const back = grid || job.pictures.length > 1;
  const name = t("drawnPicture", { prompt: title(job) });
  const media = picture.type === "video/mp4"
    ? h("video", { src: picture.url, autoplay: !calm(), loop: true, muted: true, controls: true, "aria-label": name })
    : h("img", { src: picture.url, alt: name, class: "result", onerror: () => toast(t("gone"), "error") });
  refill($("stage"), [h("figure", { class: "shown" },
    h("div", { class: "frame big" }, media),
    h("figcaption", {}, h("span", { class: "caption", dir: "auto" }, title(job)),
      h("span", { class: "hint" }, [`${picture.width}×${picture.height}`, job.request.seed !== null && `${t("seed")} ${job.request.seed + place}`, job.request.steps && `${job.request.steps} ${t("steps")}`].filter(Boolean).join(" · ")),
      job.notes.map((note) => h("span", { class: "hint" }, named(note, job.request)))),
    h("div", { class: "actions", role: "toolbar", "aria-label": t("stage") },
      back && h("button", { type: "button", class: "quiet", onclick: () => showAll(job) }, icon("grid"), t("back")),
      action("picture", "asReference", () => actions.reference(picture)),
      action("edit", "asSource", () => actions.source(picture, "edit")),
      action("brush", "asInpaint", () => actions.source(picture, "inpaint")),
      action("sliders", "asControl", () => actions.control(picture)),
      action("restore", "restore", () => actions.restore(job, place)),
      other && action("compare", "compare", () => compare({ url: other, name: t("before") }, { url: picture.url, name: title(job) }, () => show(job, place))),
      action("compare", "compareWith", () => actions.compareWith(picture, numbered(job, place), () => show(job, place))),
      h("a", { class: "button quiet", href: picture.url, download: `imprompt-${job.id.slice(0, 8)}-${place + 1}` }, icon("download"), t("download")),
      action("trash", "delete", async () => {
        const count = job.pictures.length;
        if (!confirm(t(count > 1 ? "deleteAllSure" : "deleteSure", { count }))) return;
        try {
          await forget(job.id);
          actions.forgotten(job);
        } catch (problem) { tell(problem); }
      })))]);
}

function action(glyph, name, onclick) {
  return h("button", { type: "button", class: "quiet", onclick }, icon(glyph), t(name));
}

/** All pictures of the run, or of the job, as a grid. */
function showAll(job) {
  again = () => showAll(job);
  const own = cells.length > 1 && cells.some((cell) => cell.job?.id === job.id);
  const shown = own ? cells.filter((cell) => cell.pictures.length).flatMap((cell) => cell.pictures.map((picture, place) => ({ job: cell.job, picture, place, label: cell.label })))
    : job.pictures.map((picture, place) => ({ job, picture, place, label: null }));
  refill($("stage"), [h("div", { class: "cells grid" }, shown.map((one, number) => h("figure", { class: "cell" },
    h("button", { type: "button", class: "tile", "aria-label": one.label ?? t("picture", { number: number + 1 }), onclick: () => show(one.job, one.place) }, h("img", { src: one.picture.url, alt: "" })),
    one.label ? h("figcaption", {}, h("strong", {}, one.label)) : "")))]);
}

/** Two pictures over each other with a slider between them. */
export function compare(first, second, back) {
  again = () => compare(first, second, back);
  const top = h("img", { src: first.url, alt: first.name, class: "result top" });
  const line = h("span", { class: "divide" });
  const input = h("input", { type: "range", min: "0", max: "100", value: "50", class: "wipe", "aria-label": t("compareSlider"),
    oninput: () => {
      top.style.clipPath = `inset(0 ${100 - input.value}% 0 0)`;
      line.style.left = `${input.value}%`;
    } });
  refill($("stage"), [h("figure", { class: "shown" },
    h("div", { class: "frame big ab" }, h("img", { src: second.url, alt: second.name, class: "result" }), top, line,
      h("span", { class: "side" }, first.name), h("span", { class: "side other" }, second.name), input),
    h("div", { class: "actions" }, h("button", { type: "button", class: "quiet", onclick: back }, icon("undo"), t("back"))))]);
  input.dispatchEvent(new Event("input"));
  input.focus();
}
