// Starts the page and connects its parts.

import * as api from "./api.js";
import { $, h, icon, toast } from "./dom.js";
import * as gallery from "./gallery.js";
import { language, switchLanguage, t, translate } from "./i18n.js";
import { openModels, render, setTask } from "./look.js";
import { addReference, draggedPicture, isSending, setControl, setSource, take, tell } from "./references.js";
import { change, dropPictures, fromRequest, loadDraft, newReference, offered, onchange, picturesOf, settings, toRequest } from "./settings.js";
import * as stage from "./stage.js";

const SWEEP = [0, 0.25, 0.5, 0.75, 1];
const THEMES = { system: "auto", light: "sun", dark: "moon" };
const EXAMPLES = [
  { title: "example2", text: "a heart", picture: "/static/examples/cactus-neon.webp", drawn: "/static/examples/drawn-2.webp" },
  { title: "example3", text: "a house", picture: "/static/examples/sunset.webp", drawn: "/static/examples/drawn-3.webp" },
  { title: "example1", text: "an owl on a yellow background", picture: null, drawn: "/static/examples/drawn-1.webp" },
];
const EXAMPLE_STEPS = 20;

// ---- theme and language

let theme = localStorage.getItem("imprompt.theme") ?? "system";

function showTheme() {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const label = t("theme", { name: t(theme) });
  $("theme").replaceChildren(icon(THEMES[theme]));
  $("theme").setAttribute("aria-label", label);
  $("theme").title = label;
}

function nextTheme() {
  const names = Object.keys(THEMES);
  theme = names[(names.indexOf(theme) + 1) % names.length];
  localStorage.setItem("imprompt.theme", theme);
  showTheme();
}

function showLanguage() {
  translate();
  showTheme();
  $("language").textContent = language() === "en" ? "中文" : "English";
  $("language").lang = language() === "en" ? "zh-CN" : "en";
}

// ---- drawing

function showButtons() {
  const running = stage.isRunning();
  $("generate").replaceChildren(running ? icon("x") : icon("picture"), t(running ? "stop" : "run"));
  $("generate").classList.toggle("stop", running);
  $("sweep").replaceChildren(icon("grid"), t("sweep"));
  $("sweep").title = t("sweepHint");
  $("sweep").hidden = running || !settings.references.some((reference) => !reference.avoid) || settings.task === "animate";
}

async function start(wanted) {
  if (isSending()) { toast(t("stillSending"), "error"); return; }
  try {
    await stage.draw(wanted());
  } catch (problem) {
    if (problem instanceof api.Problem) tell(problem);
    else toast(t(problem.message), "error");
  }
}

function generate(event) {
  event?.preventDefault();
  if (stage.isRunning()) stage.stop();
  else start(() => [{ request: toRequest(), label: null }]);
}

/** The same picture with five strengths of its references. */
function sweep() {
  start(() => {
    const request = toRequest();
    const seed = request.seed ?? Math.floor(Math.random() * 2 ** 32);
    return SWEEP.map((scale) => ({
      label: t("strengthIs", { value: scale.toFixed(2) }),
      request: { ...request, seed, count: 1, images: request.images.map((image) => ({ ...image, scale })) },
    }));
  });
}

let preparing = false; // an example's picture is on its way; a second click is not another wish

async function useExample({ text, picture }) {
  if (preparing || stage.isRunning()) return;
  preparing = true;
  try {
    const references = [];
    if (picture) {
      const blob = await (await fetch(picture)).blob();
      references.push(newReference(await api.upload(blob, "example.webp")));
    }
    change({ task: "generate", prompt: text, negative: "", references, steps: EXAMPLE_STEPS, seed: 7, count: 1, source: null, mask: null, control: null, extra: {}, base: null, adapter: null, size: null });
    render();
    generate();
  } catch (problem) { tell(problem); } finally { preparing = false; }
}

// ---- what can be done with a picture

function restoreRequest(request, missing) {
  fromRequest(request, missing);
  render();
  toast(missing.length ? t("restoredMissing", { count: missing.length }) : t("restored"));
}

const actions = {
  reference: (picture) => { addReference(picture); $("references").lastElementChild.scrollIntoView({ block: "nearest" }); },
  source: (picture, task) => { setTask(task); setSource(picture); $("source").scrollIntoView({ block: "nearest" }); },
  control: (picture) => setControl(picture),
  restore: async (job, place) => {
    const request = { ...job.request, seed: job.request.seed + place };
    try { restoreRequest(request, await api.missing(picturesOf(request))); } catch (problem) { tell(problem); }
  },
  compareWith: (picture, name, back) => {
    toast(t("compareHint"));
    comparing = (job, place) => {
      comparing = null;
      stage.compare({ url: picture.url, name }, { url: job.pictures[place].url, name: stage.numbered(job, place) }, back);
    };
  },
  forgotten: async (job) => {
    dropPictures(job.pictures.map((picture) => picture.id));
    render();
    await gallery.load();
    showWelcome();
  },
};
let comparing = null;

function showWelcome() {
  stage.welcome(EXAMPLES, useExample);
}

/** A picture from a file or the gallery, whose settings are wanted. */
async function restoreFrom(picture) {
  if (picture.request) {
    restoreRequest(picture.request, picture.missing);
  } else if (picture.job) {
    const job = gallery.find(picture.job) ?? await api.job(picture.job);
    actions.restore(job, picture.place ?? 0);
  } else toast(t("noRecord"), "error");
}

// ---- dropping and pasting anywhere

const TARGETS = [
  ["asReference", "picture", (picture) => addReference(picture)],
  ["restore", "restore", restoreFrom],
  ["asSource", "edit", (picture) => actions.source(picture, "edit")],
  ["asInpaint", "brush", (picture) => actions.source(picture, "inpaint")],
  ["asControl", "sliders", (picture) => actions.control(picture)],
];

function setUpDropping() {
  const area = $("drop");
  let depth = 0;
  const hide = () => { depth = 0; area.hidden = true; };
  const wanted = (event) => [...(event.dataTransfer?.types ?? [])].some((type) => type === "Files" || type === "application/x-imprompt");
  document.addEventListener("dragenter", (event) => {
    if (!wanted(event)) return;
    depth += 1;
    if (area.hidden) {
      area.replaceChildren(h("p", {}, t("dropHere")), h("div", { class: "targets" }, TARGETS.map(([name, glyph, use]) => target(name, glyph, use))));
      area.hidden = false;
    }
  });
  document.addEventListener("dragleave", (event) => { if (wanted(event) && (depth -= 1) <= 0) hide(); });
  document.addEventListener("dragover", (event) => { if (wanted(event)) event.preventDefault(); });
  document.addEventListener("drop", (event) => { if (wanted(event)) event.preventDefault(); hide(); });
  document.addEventListener("dragend", hide);
  document.addEventListener("dropped", hide);
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length) { event.preventDefault(); take(files, addReference); }
  });
}

function target(name, glyph, use) {
  const place = h("div", { class: "target", "data-target": name }, icon(glyph), t(name));
  place.addEventListener("dragenter", () => place.classList.add("over"));
  place.addEventListener("dragleave", () => place.classList.remove("over"));
  place.addEventListener("drop", (event) => {
    event.preventDefault();
    const picture = draggedPicture(event);
    if (picture) use(picture);
    else take(event.dataTransfer.files, use);
  });
  return place;
}

// ---- start

function renderAll() {
  showLanguage();
  render();
  showButtons();
  gallery.render();
}

async function begin() {
  showLanguage();
  try {
    offered.capabilities = await api.capabilities();
  } catch (problem) {
    tell(problem);
    return;
  }
  loadDraft();
  stage.setUp({ actions, onstate: (running, drawn) => { comparing = null; showButtons(); if (!running && drawn) gallery.load(); } });
  gallery.setUp((job, place) => {
    if (comparing) comparing(job, place);
    else stage.show(job, place);
    $("stage").scrollIntoView({ block: "nearest" });
  });
  onchange(showButtons);
  renderAll();
  showWelcome();
  await gallery.load();
  $("form").addEventListener("submit", generate);
  $("generate").addEventListener("click", (event) => { if (event.detail > 1) event.preventDefault(); }); // a double click draws, and does not stop at once
  $("sweep").addEventListener("click", sweep);
  $("model").addEventListener("click", openModels);
  $("theme").addEventListener("click", nextTheme);
  $("language").addEventListener("click", () => { switchLanguage(); renderAll(); if (!stage.isRunning()) stage.refresh(); });
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    if ((event.ctrlKey || event.metaKey) && event.key === "Enter") { event.preventDefault(); generate(); }
    if (event.key === "Escape" && stage.isRunning()) stage.stop();
  });
  setUpDropping();
  document.documentElement.dataset.ready = "true";
  await stage.resume();
}

begin();
