// The page's script: a cursor over the step, moved by pointer or keys, and the folding table of modules.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { ops, tensors, plan, stored } = data;
  const at = (id) => document.getElementById(id);
  const count = plan.op.length;
  const shown = 8;
  const laneNames = {
    stored: "kept for the backward",
    dropped: "freed, recomputed later",
    freed: "freed after its last use",
    recomputed: "recomputed",
    backward: "backward",
  };

  const begins = (runs) => {
    const found = [0];
    const pace = runs.pace || 1;
    for (const op of runs.op) found.push(found[found.length - 1] + (data.timed ? ops.time[op] * pace : 1));
    return found;
  };
  const planBegins = begins(plan);
  const storedBegins = begins(stored);
  const given = new Set(tensors.given);

  // The execution that runs at a moment: the last that has begun.
  const runningAt = (edges, moment) => {
    let low = 0;
    let high = edges.length - 2;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (edges[middle] <= moment) low = middle;
      else high = middle - 1;
    }
    return low;
  };

  // Rounded up in the last digit, as the package writes sizes.
  const size = (bytes) => {
    if (bytes < 1024) return `${bytes} B`;
    const letters = ["KiB", "MiB", "GiB", "TiB"];
    let power = 1;
    let hundredths = Math.ceil((bytes * 100) / 1024);
    while (hundredths >= 102400 && power < letters.length) {
      power += 1;
      hundredths = Math.ceil((bytes * 100) / 1024 ** power);
    }
    return `${(hundredths / 100).toFixed(2)} ${letters[power - 1]}`;
  };
  const seconds = (time) => {
    const rounded = Number(time.toPrecision(3));
    const [factor, unit] = rounded >= 1 ? [1, "s"] : rounded >= 1e-3 ? [1e3, "ms"] : [1e6, "us"];
    return `${Number((rounded * factor).toPrecision(3))} ${unit}`;
  };
  const text = (column, op) => column.table[column.at[op]];
  const number = (value) => value.toLocaleString("en-US");
  const percent = (part, whole) => `${((100 * part) / whole).toFixed(1)}%`;

  const liveAt = (position) => {
    const live = [];
    for (let i = 0; i < plan.birth.length && plan.birth[i] <= position; i += 1) {
      if (plan.death[i] >= position) live.push(i);
    }
    return live.sort((a, b) => tensors.size[plan.tensor[b]] - tensors.size[plan.tensor[a]] || a - b);
  };

  const element = (name, content, className) => {
    const made = document.createElement(name);
    made.textContent = content;
    if (className) made.className = className;
    return made;
  };

  const facts = (position) => {
    const op = plan.op[position];
    const other = runningAt(storedBegins, planBegins[position]);
    const time = ops.time[op];
    const rows = [
      ["Module", text(ops.module, op) || "(model)"],
      ["Source", text(ops.source, op) || "(no line of yours)"],
      ["Runs", text(ops.target, op) || "unknown"],
      ["Memory", `${size(plan.live[position])}, ${percent(plan.live[position], data.budget || 1)} of the budget`],
      ["Workspace", size(ops.workspace[op])],
      ["Time", data.timed ? `${seconds(time)}, from ${seconds(planBegins[position])}` : "unknown"],
    ];
    if (stored.live.length) rows.splice(4, 0, [data.timed ? "Store-all then" : "Store-all", size(stored.live[other])]);
    return rows;
  };

  const showPanel = (position) => {
    const op = plan.op[position];
    const phase = position < plan.boundary ? "forward" : "backward";
    const lane = laneNames[text(plan.lane, position)];
    at("where").textContent = `${number(position + 1)} of ${number(count)} · ${phase}${lane === phase ? "" : ` · ${lane}`}`;
    at("op").textContent = ops.name[op];
    at("facts").replaceChildren(
      ...facts(position).flatMap(([name, value]) => [element("dt", name), element("dd", value)]),
    );
    const live = liveAt(position);
    const total = live.reduce((sum, i) => sum + tensors.size[plan.tensor[i]], 0);
    at("live-title").textContent = `${number(live.length)} live tensor${live.length === 1 ? "" : "s"}, ${size(total)}`;
    const rows = live.slice(0, shown).map((i) => {
      const tensor = plan.tensor[i];
      const row = document.createElement("tr");
      const name = element("th", given.has(tensor) ? "given to the backward" : ops.name[plan.op[plan.birth[i]]]);
      name.scope = "row";
      const module = given.has(tensor) ? "" : text(ops.module, plan.op[plan.birth[i]]);
      name.append(element("small", [module, tensors.label[tensor]].filter(Boolean).join(" · ")));
      row.append(name, element("td", size(tensors.size[tensor]), "number"));
      return row;
    });
    if (live.length > shown) {
      const rest = live.slice(shown).reduce((sum, i) => sum + tensors.size[plan.tensor[i]], 0);
      const row = document.createElement("tr");
      row.append(element("th", `${number(live.length - shown)} more`), element("td", size(rest), "number"));
      rows.push(row);
    }
    at("live").replaceChildren(...rows);
    return live;
  };

  const plot = at("plot");
  const cursor = at("cursor");
  let current = -1;

  const place = (position) => {
    const middle = (planBegins[position] + planBegins[position + 1]) / 2;
    const inside = plot.offsetLeft + (plot.clientWidth * middle) / data.span;
    cursor.style.left = `${inside - 1}px`;
    cursor.style.setProperty("--dot", `${plot.clientHeight * (1 - plan.live[position] / data.top)}px`);
    cursor.hidden = false;
    at("tip").textContent = `${ops.name[plan.op[position]]} · ${size(plan.live[position])}`;
    at("tip").className = inside > at("stage").clientWidth / 2 ? "tip left" : "tip";
  };

  const speak = (position, live) => {
    const op = plan.op[position];
    const names = live.slice(0, 3).map((i) => `${tensors.label[plan.tensor[i]]}, ${size(tensors.size[plan.tensor[i]])}`);
    const phase = position < plan.boundary ? "forward" : "backward";
    at("spoken").textContent =
      `${ops.name[op]}, ${phase}, ${laneNames[text(plan.lane, position)]}; module ${text(ops.module, op) || "the model"}, ` +
      `${text(ops.source, op) || "no line of yours"}; ${size(plan.live[position])} live` +
      (names.length ? `; largest: ${names.join("; ")}` : "");
  };

  const moveTo = (wanted, aloud) => {
    const position = Math.max(0, Math.min(count - 1, wanted));
    if (position === current) return;
    current = position;
    place(position);
    const live = showPanel(position);
    plot.setAttribute("aria-valuenow", String(position + 1));
    plot.setAttribute("aria-valuetext", `${position + 1} of ${count}`);
    if (aloud) speak(position, live);
  };

  const pointed = (event) => {
    const box = plot.getBoundingClientRect();
    const moment = ((event.clientX - box.left) / box.width) * data.span;
    moveTo(runningAt(planBegins, moment), false);
  };

  const start = () => {
    plot.setAttribute("role", "slider");
    plot.setAttribute("tabindex", "0");
    plot.setAttribute("aria-valuemin", "1");
    plot.setAttribute("aria-valuemax", String(count));
    at("panel").hidden = false;
    const leap = Math.max(1, Math.round(count / 20));
    const moves = {
      ArrowRight: () => current + 1,
      ArrowUp: () => current + 1,
      ArrowLeft: () => current - 1,
      ArrowDown: () => current - 1,
      PageUp: () => current + leap,
      PageDown: () => current - leap,
      Home: () => 0,
      End: () => count - 1,
      p: () => plan.peak,
      b: () => plan.boundary,
    };
    // One redraw per frame, however fast the pointer is. A browser tells of a mouse that lies still where a page
    // appears or moves under it: so a key drops what waits and the pointer's next move, and the second one counts.
    let latest = null;
    let waiting = false;
    let keyed = false;
    const follow = (event) => {
      const passed = keyed && event.type === "pointermove";
      keyed = false;
      if (passed) return;
      latest = event;
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        if (latest !== null) pointed(latest);
        latest = null;
      });
    };
    plot.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(moves, event.key)) return;
      event.preventDefault();
      latest = null;
      keyed = true;
      moveTo(moves[event.key](), true);
    });
    for (const name of ["pointermove", "pointerdown"]) at("stage").addEventListener(name, follow);
    at("to-peak").addEventListener("click", () => moveTo(plan.peak, true));
    at("to-boundary").addEventListener("click", () => moveTo(plan.boundary, true));
    at("back").addEventListener("click", () => moveTo(current - 1, true));
    at("on").addEventListener("click", () => moveTo(current + 1, true));
    addEventListener("resize", () => place(current));
    moveTo(plan.peak, false);
  };

  const fold = (table) => {
    const rows = [...table.tBodies[0].rows];
    const buttons = rows.map((row) => row.querySelector("button"));
    const parents = rows.map((row) => Number(row.dataset.parent));
    const open = buttons.map((button) => button !== null && button.getAttribute("aria-expanded") === "true");
    const show = () => {
      rows.forEach((row, i) => {
        const parent = parents[i];
        row.hidden = parent >= 0 && (rows[parent].hidden || !open[parent]);
      });
    };
    buttons.forEach((button, i) => {
      if (button === null) return;
      button.disabled = false;
      button.addEventListener("click", () => {
        open[i] = !open[i];
        button.setAttribute("aria-expanded", String(open[i]));
        show();
      });
    });
    show();
  };

  // What is cut at the right fades out, until it is scrolled to its end.
  const fade = (edge) => {
    const inner = edge.firstElementChild;
    const show = () => edge.classList.toggle("more", inner.scrollLeft + inner.clientWidth < inner.scrollWidth - 1);
    inner.addEventListener("scroll", show, { passive: true });
    addEventListener("resize", show);
    edge.closest("details")?.addEventListener("toggle", show); // folded, it has no width
    show();
  };

  if (count > 0) start();
  fold(at("modules"));
  document.querySelectorAll(".edge").forEach(fade);
})();
