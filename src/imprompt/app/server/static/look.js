// The rest of the form: tabs, words, size, steps, seed, count, and the choice of model and adapter.

import { $, choice, dialog, h, icon, iconButton, refill, slider } from "./dom.js";
import { t } from "./i18n.js";
import { kept, render as renderPictures } from "./references.js";
import { adaptersHere, autoScale, baseRow, change, changed, offered, settings } from "./settings.js";

const TASKS = { generate: "picture", edit: "edit", inpaint: "brush", animate: "film" };
const SEEDS = 2 ** 53 - 1; // the largest whole number that JSON keeps
const SHAPES = [["square", 1, 1], ["tall", 3, 4], ["wide", 4, 3]];

function renderTabs() {
  const canMove = offered.capabilities.motions.some((row) => row.family === baseRow().family && row.offered);
  const tabs = Object.entries(TASKS).filter(([task]) => task !== "animate" || canMove || settings.task === "animate")
    .map(([task, glyph]) => h("button", {
      type: "button", role: "tab", id: `tab-${task}`, "aria-selected": String(settings.task === task), "aria-controls": "form",
      tabindex: settings.task === task ? "0" : "-1", onclick: () => setTask(task),
      onkeydown: (event) => {
        const names = tabs.map((tab) => tab.id.slice(4));
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!step) return;
        event.preventDefault();
        setTask(names[(names.indexOf(settings.task) + step + names.length) % names.length]);
        $(`tab-${settings.task}`).focus();
      },
    }, icon(glyph), h("span", {}, t(task))));
  refill($("tabs"), tabs);
}

export function setTask(task) {
  if (task === "animate" || settings.task === "animate") change({ task, source: null, mask: null, strength: null });
  else change({ task, strength: null });
  render();
}

function renderWords() {
  const { words } = offered.capabilities;
  for (const name of ["prompt", "negative"]) {
    const field = $(name);
    field.value = settings[name];
    field.oninput = () => { say(name, field.value); grow(field); };
    grow(field);
  }
  $("prompt").placeholder = t("promptPlaceholder");
  if (settings.negative) $("negative-box").open = true;
  $("words-hint").hidden = baseRow().family !== "emoji";
  const write = (text) => { say("prompt", text); renderWords(); };
  const chip = (text, onclick) => h("button", { type: "button", class: "chip", onclick }, text);
  const things = words.concepts.map((word) => word.replaceAll("-", " "));
  refill($("words-hint"), [h("details", { open: Boolean($("words-hint").querySelector("details")?.open) },
    h("summary", {}, t("words", { count: things.length, styles: words.styles.length })),
    h("div", { class: "chips" }, things.map((thing) => chip(thing, () => write(`${"aeiou".includes(thing[0]) ? "an" : "a"} ${thing}`)))),
    h("div", { class: "chips" }, words.styles.map((style) => chip(t("inStyle", { name: style }), () => write(`${settings.prompt.replace(/, \S+ style$/, "")}, ${style} style`)))),
    h("p", { class: "hint" }, t("wordsMore")))]);
}

/** Keep a text; pictures beside words act less than pictures alone. */
function say(name, text) {
  const before = autoScale();
  change({ [name]: text });
  if (autoScale() !== before) renderPictures();
}

function grow(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

function number(label, name, { min, max, step = 1, placeholder }) {
  return h("label", { class: "number" }, h("span", { class: "name" }, label),
    h("input", { type: "number", min: String(min), max: String(max), step: String(step), value: settings[name] ?? "", placeholder,
      onchange: (event) => {
        const { value } = event.target;
        const whole = Number.isInteger(step) ? Math.round : Number;
        change({ [name]: value === "" ? null : Math.min(max, Math.max(min, whole(value))) });
        event.target.value = settings[name] ?? "";
      } }));
}

function shapes() {
  const side = baseRow().size ?? 512;
  const grid = baseRow().multiple ?? 16; // FLUX's and SD3's; UNets draw such sizes too
  const even = (length) => Math.round(length / grid) * grid;
  const sized = ([key, x, y]) => ({ key, text: t(key), size: [even(side * Math.sqrt(x / y)), even(side * Math.sqrt(y / x))] });
  const options = SHAPES.map(sized);
  const now = settings.size ? options.find(({ size }) => size.join() === settings.size.join())?.key : "square";
  const field = (place, label) => h("input", {
    type: "number", min: "64", max: String(offered.capabilities.limits.side), step: String(grid), "aria-label": label, title: label,
    value: settings.size?.[place] ?? "", placeholder: String(side),
    onchange: (event) => {
      const size = settings.size ? [...settings.size] : [side, side];
      size[place] = Math.max(64, Math.min(offered.capabilities.limits.side, even(Number(event.target.value)) || side));
      change({ size });
      setTimeout(renderLook); // the focus is on its way to the next field
    },
  });
  return h("div", { class: "field" }, h("div", { class: "row" }, h("span", { class: "name" }, t("size")), h("span", { class: "grow" }),
    field(0, t("width")), "×", field(1, t("height"))),
  choice(t("size"), options, now, (key) => { change({ size: key === "square" ? null : options.find((one) => one.key === key).size }); renderLook(); }));
}

function seed() {
  const input = h("input", {
    type: "number", min: "0", max: String(SEEDS), step: "1", value: settings.seed ?? "", placeholder: t("seedRandom"), "aria-label": t("seed"),
    onchange: () => {
      change({ seed: input.value === "" ? null : Math.min(SEEDS, Math.max(0, Math.floor(Number(input.value)))) });
      input.value = settings.seed ?? "";
    },
  });
  return h("div", { class: "number wide" }, h("span", { class: "name" }, t("seed")), h("div", { class: "row" }, input,
    iconButton("dice", t("seedRoll"), () => { change({ seed: null }); input.value = ""; })));
}

function renderLook() {
  const { limits } = offered.capabilities;
  const clip = settings.task === "animate";
  const opened = $("look").querySelector("details")?.open;
  refill($("look"), [
    shapes(),
    clip ? "" : slider(t("count"), { value: settings.count, min: 1, max: Math.min(8, limits.count), step: 1, oninput: (count) => change({ count }) }),
    h("details", { open: Boolean(opened) }, h("summary", {}, t("moreSettings")), h("div", { class: "numbers" },
      seed(),
      number(t("steps"), "steps", { min: 1, max: limits.steps, placeholder: t("auto") }),
      number(t("guidance"), "guidance", { min: 0, max: 30, step: 0.5, placeholder: t("auto") }),
      clip && number(t("frames"), "frames", { min: 2, max: limits.frames, placeholder: "16" }),
      clip && number(t("fps"), "fps", { min: 1, max: 60, placeholder: "8" }))),
    kept(settings.extra, () => { change({ extra: {} }); renderLook(); }) ?? "",
  ]);
}

function renderModel() {
  const row = baseRow();
  const name = t("modelNamed", { name: settings.adapter ? `${row.name} · ${settings.adapter}` : row.name });
  $("model").replaceChildren(icon("model"), h("span", {}, name));
  $("model").setAttribute("aria-label", `${name}. ${t("model")}`);
}

function modelRow(kind, row, chosen, command) {
  const usable = row.offered;
  return h("label", { class: usable ? "option" : "option disabled" },
    h("input", { type: "radio", name: kind, value: row.name ?? "", checked: chosen, disabled: !usable,
      onchange: () => {
        if (kind === "base") change({ base: row.name, adapter: null, size: null });
        else change({ adapter: row.name });
        render();
        if (kind === "base") openModels.refresh();
      } }),
    h("span", { class: "option-body" },
      h("span", { class: "row" }, h("strong", {}, row.label ?? row.name), row.megabytes && h("span", { class: "hint" }, `${row.megabytes} MB`),
        row.size && h("span", { class: "hint" }, `${row.size} px`), h("span", { class: "grow" }),
        h("span", { class: row.here ? "tag here" : "tag" }, t(row.here ? "modelHere" : "modelNotHere"))),
      row.note && h("span", {}, row.note),
      row.licence && h("span", { class: "hint" }, `${t("licence")}: ${row.licence}`),
      !usable && command && h("span", { class: "hint" }, t("getIt", { command }))));
}

export function openModels() {
  const body = h("div", { class: "models" });
  openModels.refresh = () => {
    const { bases } = offered.capabilities;
    const adapters = [{ name: null, label: t("defaultAdapter"), offered: true, here: true }, ...adaptersHere()];
    refill(body, [
      h("fieldset", {}, h("legend", {}, t("bases")), bases.map((row) => modelRow("base", row, row.name === baseRow().name, row.source && `hf download ${row.source}`))),
      h("fieldset", {}, h("legend", {}, t("adapters")), adapters.map((row) => modelRow("adapter", row, row.name === settings.adapter, null)))]);
  };
  openModels.refresh();
  dialog(t("model"), body, { wide: true });
}

export function render() {
  renderTabs();
  renderWords();
  renderLook();
  renderModel();
  renderPictures();
}
