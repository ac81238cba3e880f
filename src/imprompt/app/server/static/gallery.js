// The pictures drawn before, newest first. Each can be opened, dragged, and chosen wherever a picture is asked.

import { history } from "./api.js";
import { $, calm, h, refill } from "./dom.js";
import { t } from "./i18n.js";
import { setHistory, tell } from "./references.js";

let jobs = [];
let next = null;
let onopen = () => {};

const pictures = () => jobs.flatMap((job) => job.pictures.map((picture, place) => ({ job, picture, place, name: `${t("drawnPicture", { prompt: job.request.prompt || t("withoutWords") })}` })));

export function setUp(open) {
  onopen = open;
  setHistory(pictures);
  $("more").onclick = () => load(true);
}

/** Load the newest page, or one more. */
export async function load(more = false) {
  try {
    const page = await history(more ? next : null);
    jobs = more ? [...jobs, ...page.jobs] : page.jobs;
    next = page.next;
  } catch (problem) { tell(problem); }
  render();
}

export function render() {
  $("more").hidden = !next;
  const items = pictures();
  refill($("gallery"), items.length ? items.map(item) : [h("li", { class: "hint" }, t("historyEmpty"))]);
}

function item({ job, picture, place, name }) {
  const tile = h("button", { type: "button", class: "tile", title: name, "aria-label": name, draggable: true, onclick: () => onopen(job, place),
    ondragstart: (event) => {
      event.dataTransfer.setData("application/x-imprompt", JSON.stringify({ ...picture, job: job.id, place }));
      event.dataTransfer.effectAllowed = "copy";
    } }, h("img", { src: picture.frames > 1 && !calm() ? picture.url : picture.thumbnail, alt: "", loading: "lazy", draggable: false }));
  return h("li", {}, tile);
}

export const find = (id) => jobs.find((job) => job.id === id);
