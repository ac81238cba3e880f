// Choosing pictures: the field to drop on, the reference cards, the source picture and the control card.

import { controlMap, Problem, upload } from "./api.js";
import { $, choice, dialog, h, icon, iconButton, refill, slider, toast } from "./dom.js";
import { t } from "./i18n.js";
import { paint } from "./painter.js";
import { adaptersHere, autoScale, baseRow, changed, faceAdapter, newReference, offered, settings, taken } from "./settings.js";

const FRAMINGS = ["crop", "top", "bottom", "left", "right", "pad", "squash", "tile"];
const percent = (value) => value.toFixed(2);

/** Tell an error of the API in the user's words. */
export function tell(problem) {
  toast(problem.code === "offline" ? t("offline") : problem.message, "error");
}

/** Upload files, one after the other, and hand each picture to `use`. */
export async function take(files, use) {
  for (const file of [...files]) {
    const sent = sending(shortened(file.name));
    try {
      const wrong = await unfit(file);
      if (wrong) throw new Problem(0, { code: "unfit", message: wrong });
      use(await upload(file, file.name || "picture.png", sent.signal));
    } catch (problem) {
      if (problem.code === "offline") tell(problem);
      else if (problem.code !== "aborted") toast(`${shortened(file.name)}: ${problem.message.replace(/^file: /, "")}`, "error");
    } finally { sent.over(); }
  }
}

let underway = 0;
/** Whether files are on their way to the server, so that the form does not show them yet. */
export const isSending = () => underway > 0;

/** Count a file as on its way, and say so when that takes a moment, with a button that gives it up. */
function sending(name) {
  let note = null;
  const stopper = new AbortController();
  const timer = setTimeout(() => {
    note = toast(t("sending", { name }), "busy", { name: t("sendNot"), onclose: () => stopper.abort() });
  }, 400);
  underway += 1;
  const over = () => {
    underway -= 1;
    clearTimeout(timer);
    note?.remove();
  };
  return { signal: stopper.signal, over };
}

/** Why a file is not even sent, or null. What a file without a known type is, the server says. */
async function unfit(file) {
  if (file.type && !/^(image|video)\//.test(file.type)) return t("notPicture");
  const most = offered.capabilities.limits.picture_bytes;
  if (file.size > most) return t("tooLarge", { size: Math.ceil(file.size / 2 ** 20), most: most / 2 ** 20 });
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch { return t("unreadable"); } // a folder, or gone since it was chosen
  return null;
}

const shortened = (name) => (name.length > 48 ? `${name.slice(0, 30)}…${name.slice(-14)}` : name);

/** The picture that is dragged from the gallery, if one is. */
export const draggedPicture = (event) => {
  const text = event.dataTransfer?.getData("application/x-imprompt");
  return text ? JSON.parse(text) : null;
};

/** A field that takes pictures: drop, choose a file, or pick from the history. */
export function well(text, use, { multiple = false, compact = false } = {}) {
  const input = h("input", { type: "file", accept: "image/*,video/*", multiple, class: "visually-hidden", "aria-label": text,
    onchange: async () => { await take(input.files, use); input.value = ""; } });
  const field = h("div", { class: compact ? "well compact" : "well" },
    h("label", { class: "well-main" }, input, icon("upload"), h("span", {}, text)),
    h("button", { type: "button", class: "quiet", onclick: () => pickFromHistory(use) }, icon("history"), t("fromHistory")));
  field.addEventListener("dragover", (event) => { event.preventDefault(); field.classList.add("over"); });
  field.addEventListener("dragleave", () => field.classList.remove("over"));
  field.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    field.classList.remove("over");
    document.dispatchEvent(new Event("dropped"));
    const picture = draggedPicture(event);
    if (picture) use(picture);
    else take(event.dataTransfer.files, use);
  });
  return field;
}

export let pickFromHistory = () => {};
/** The gallery says how its pictures are listed. */
export const setHistory = (list) => {
  pickFromHistory = (use) => {
    const pictures = list();
    const box = dialog(t("fromHistory"), pictures.length
      ? h("ul", { class: "gallery" }, pictures.map(({ picture, name }) => h("li", {},
        h("button", { type: "button", class: "tile", "aria-label": name, onclick: () => { box.close(); use(picture); } },
          h("img", { src: picture.thumbnail, alt: "" })))))
      : h("p", { class: "hint" }, t("historyEmpty")), { wide: true });
  };
};

function thumbnail(picture, name) {
  return h("img", { src: picture.thumbnail, alt: name, loading: "lazy" });
}

/** Width and height that will be drawn, for masks over the result. */
export function drawnSize() {
  const side = baseRow().size ?? 512;
  return settings.size ?? [side, side];
}

async function paintArea(holder, options) {
  const blob = await paint(options);
  if (!blob) return;
  try {
    holder.mask = await upload(blob, "mask.png");
    changed();
    render();
  } catch (problem) { tell(problem); }
}

function card(reference, number) {
  const name = t("picture", { number: number + 1 });
  const update = (values, again = false) => { Object.assign(reference, values); changed(); if (again) render(); };
  const whole = !baseRow().profiles;
  const takes = ["everything", "style", "composition"].map((key) => (
    { key, text: t(key), disabled: whole && key !== "everything", hint: whole ? t("takenWhole") : "" }));
  const face = faceAdapter();
  if (adaptersHere().some((row) => row.face)) takes.push({ key: "face", text: t("face"), disabled: !face, hint: face ? face.note : t("noFace") });
  const [width, height] = drawnSize();
  const shown = reference.scale ?? autoScale();
  const strength = slider(t("strength"), {
    value: shown, min: 0, max: 1.5, step: 0.05,
    format: (value) => (reference.scale === null && value === shown ? `${value.toFixed(2)} · ${t("auto")}` : value.toFixed(2)),
    oninput: (value) => update({ scale: value }),
  });
  return h("li", { class: reference.avoid ? "card avoid" : "card" },
    h("div", { class: "thumbs" }, reference.pictures.map((picture, place) =>
      h("div", { class: "thumb" }, thumbnail(picture, place ? `${name} ${place + 1}` : name),
        reference.pictures.length > 1 && iconButton("x", `${t("remove")}: ${name} ${place + 1}`, () => update({ pictures: reference.pictures.filter((one) => one !== picture) }, true), { class: "mini" })))),
    h("div", { class: "card-body" },
      h("div", { class: "row" }, h("h3", {}, reference.avoid ? `${name} · ${t("avoid")}` : name), h("span", { class: "grow" }),
        iconButton("x", `${t("remove")}: ${name}`, () => { settings.references.splice(number, 1); changed(); render(); })),
      !reference.avoid && strength,
      !reference.avoid && choice(`${t("take")}: ${name}`, takes, taken(reference), (take) => update({ take })),
      kept(reference.extra, () => update({ extra: {} }, true)),
      h("details", { open: Boolean(reference.opened), ontoggle: (event) => { reference.opened = event.target.open; } },
        h("summary", { "aria-label": `${t("details")}: ${name}` }, t("details")),
        h("div", { class: "stack" },
          !reference.avoid && span(reference, name, update),
          !reference.avoid && framing(reference, name, update),
          !reference.avoid && h("div", { class: "row" },
            h("button", { type: "button", class: "quiet", onclick: () => paintArea(reference, { title: t("paintArea"), picture: null, width, height, mask: reference.mask?.url }) },
              icon("brush"), reference.mask ? t("areaSet") : t("area")),
            reference.mask && iconButton("x", `${t("remove")}: ${t("areaSet")}`, () => update({ mask: null }, true))),
          !reference.avoid && well(t("addView"), (picture) => update({ pictures: [...reference.pictures, picture] }, true), { compact: true }),
          h("label", { class: "check", title: t("avoidHint") },
            h("input", { type: "checkbox", checked: reference.avoid, onchange: (event) => avoidOnly(event.target.checked ? reference : null) }), t("avoid"))))));
}

/** At most one picture is avoided, for a request has no more. */
function avoidOnly(avoided) {
  for (const reference of settings.references) reference.avoid = reference === avoided;
  changed();
  render();
}

/** What a restored picture says beyond what the page shows, by name, and a button to leave it out; or null. */
export function kept(extra, forget) {
  const names = Object.keys(extra);
  return names.length ? h("p", { class: "row hint" }, h("span", {}, t("kept", { names: names.join(", ") })),
    h("button", { type: "button", class: "quiet", onclick: forget }, t("forget"))) : null;
}

function span(reference, name, update) {
  const limit = (which, value) => (which === "start" ? Math.min(value, reference.end) : Math.max(value, reference.start));
  const one = (which, label) => h("label", { class: "row" }, h("span", { class: "name" }, label),
    h("input", { type: "number", min: "0", max: "1", step: "0.05", value: percent(reference[which]), "aria-label": `${t("window")} ${label}: ${name}`,
      onchange: (event) => {
        const value = limit(which, Math.min(1, Math.max(0, Number(event.target.value) || 0)));
        event.target.value = percent(value);
        update({ [which]: value });
      } }));
  return h("div", { class: "row span", title: t("windowHint") }, h("span", { class: "name" }, t("window")), one("start", t("from")), one("end", t("to")));
}

function framing(reference, name, update) {
  return h("label", { class: "row" }, h("span", { class: "name" }, t("framing")),
    h("select", { "aria-label": `${t("framing")}: ${name}`, onchange: (event) => update({ framing: event.target.value }) },
      FRAMINGS.map((key) => h("option", { value: key, selected: key === (reference.framing ?? "crop") }, t(`framing_${key}`)))));
}

function renderReferences() {
  refill($("reference-drop"), [well(t("addReference"), addReference, { multiple: true, compact: settings.references.length > 0 })]);
  refill($("references"), settings.references.map(card), $("reference-drop"));
}

export function addReference(picture) {
  settings.references.push(newReference(picture));
  changed();
  render();
}

function renderSource() {
  const { task, source } = settings;
  $("source").hidden = task === "generate";
  if (task === "generate") return;
  $("source-title").textContent = t(task === "animate" ? "sourceVideo" : "source");
  if (!source) {
    refill($("source-body"), [well(t(task === "animate" ? "addVideo" : "addReference"), setSource)]);
    return;
  }
  const paintMask = () => paintArea(settings, { title: t("mask"), picture: source.url, width: source.width, height: source.height, mask: settings.mask?.url });
  refill($("source-body"), [h("div", { class: "card" },
    h("div", { class: "thumbs" }, h("div", { class: "thumb" }, thumbnail(source, t("source")),
      task === "inpaint" && settings.mask && h("img", { class: "veil", src: settings.mask.thumbnail, alt: "" }))),
    h("div", { class: "card-body" },
      h("div", { class: "row" }, task === "inpaint" && h("button", { type: "button", class: settings.mask ? "quiet" : "call", onclick: paintMask }, icon("brush"), t(settings.mask ? "maskAgain" : "mask")),
        h("span", { class: "grow" }), iconButton("x", `${t("remove")}: ${t("source")}`, () => { Object.assign(settings, { source: null, mask: null }); changed(); render(); })),
      slider(t("redraw"), { value: settings.strength ?? (task === "inpaint" ? 1 : 0.6), min: 0.1, max: 1, step: 0.05, format: percent,
        oninput: (strength) => { settings.strength = strength; changed(); } })))]);
}

export function setSource(picture) {
  if (settings.task === "animate" && picture.frames === 1) {
    toast(t("stillHere"), "error");
    return;
  }
  Object.assign(settings, { source: picture, mask: null });
  changed();
  render();
}

function renderControl() {
  const family = baseRow().family;
  const kinds = Object.keys(offered.capabilities.default_controls[family] ?? {}).filter((kind) => kind !== "frame" && kind !== "none");
  const usable = kinds.filter((kind) => offered.capabilities.controls.some((row) => row.family === family && row.kinds.includes(kind) && row.offered));
  $("control-box").hidden = !usable.length && !settings.control;
  const { control } = settings;
  if (!control) {
    refill($("control"), [well(t("addReference"), (picture) => setControl(picture, usable[0]))]);
    return;
  }
  $("control-box").open = true;
  const map = h("img", { class: "map", alt: t("controlMap"), hidden: true });
  const showMap = async () => {
    try {
      const found = await controlMap(control.kind, control.picture.id);
      Object.assign(map, { src: found.url, hidden: false });
    } catch { map.hidden = true; }
  };
  showMap();
  refill($("control"), [h("div", { class: "card" },
    h("div", { class: "thumbs" }, h("div", { class: "thumb" }, thumbnail(control.picture, t("control"))), h("div", { class: "thumb" }, map)),
    h("div", { class: "card-body" },
      h("div", { class: "row" }, h("label", { class: "row" }, h("span", { class: "name" }, t("controlKind")),
        h("select", { "aria-label": t("controlKind"), onchange: (event) => { control.kind = event.target.value; control.extra = {}; changed(); showMap(); } },
          [...new Set([...usable, control.kind])].map((kind) => h("option", { value: kind, selected: kind === control.kind }, kind)))),
      h("span", { class: "grow" }), iconButton("x", `${t("remove")}: ${t("control")}`, () => { settings.control = null; changed(); render(); })),
      slider(t("strength"), { value: control.scale, min: 0, max: 2, step: 0.05, format: percent, oninput: (scale) => { control.scale = scale; changed(); } }),
      span(control, t("control"), (values) => { Object.assign(control, values); changed(); }),
      kept(control.extra, () => { control.extra = {}; changed(); render(); })))]);
}

export function setControl(picture, kind = "canny") {
  settings.control = { picture, kind, scale: 1, start: 0, end: 1, extra: {} };
  changed();
  render();
}

export function render() {
  renderReferences();
  renderSource();
  renderControl();
}
