// Curves: uPlot with the page's colours, a text for screen readers, and words where nothing is yet.

const SMOOTH_FROM = 40; // points; fewer are drawn as they are
const WINDOW = 20;

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// A running mean over the last points that are there, as the coordinator's own figures are.
export function smoothed(values) {
  const kept = [];
  return values.map((value) => {
    if (value === null) return null;
    kept.push(value);
    if (kept.length > WINDOW) kept.shift();
    return kept.reduce((sum, each) => sum + each, 0) / kept.length;
  });
}

export const figure = (value) =>
  value === null || value === undefined ? "–" : Number(value.toPrecision(4)).toString();

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let place = 0;
  while (count >= 999.5 && place < units.length - 1) { count /= 1000; place += 1; }
  return `${place ? count.toPrecision(3) : count} ${units[place]}`;
}

// One chart. `show({x, xLabel, format, series, summary, empty})` draws what it is given; where only
// points were added, uPlot takes the data and keeps its axes.
export class Chart {
  constructor(id) {
    this.element = document.getElementById(id);
    this.plot = null;
    this.given = null;
    this.kind = "";
    new ResizeObserver(() => this.fit()).observe(this.element);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.kind = "";
      if (this.given) this.show(this.given);
    });
  }

  show(given) {
    this.given = given;
    this.element.setAttribute("aria-label", given.empty || given.summary);
    if (given.empty) return this.say(given.empty);
    const kind = JSON.stringify([given.xLabel, given.series.map((each) => each.label)]);
    const data = [given.x, ...given.series.map((each) => each.values)];
    if (this.plot && kind === this.kind) return this.plot.setData(data);
    this.kind = kind;
    this.clear();
    this.plot = new uPlot(this.options(given), data, this.element);
    requestAnimationFrame(() => this.fit()); // then the legend's height is known
  }

  say(text) {
    this.kind = "";
    this.clear();
    const words = document.createElement("p");
    words.className = "empty";
    words.textContent = text;
    this.element.append(words);
  }

  clear() {
    this.plot?.destroy();
    this.plot = null;
    this.element.replaceChildren();
  }

  fit() {
    if (!this.plot) return;
    const legend = this.element.querySelector(".u-legend")?.offsetHeight ?? 0;
    const size = { width: this.element.clientWidth, height: this.element.clientHeight - legend };
    if (size.width && (size.width !== this.plot.width || size.height !== this.plot.height)) this.plot.setSize(size);
  }

  options(given) {
    const [text, line] = [colour("--muted"), colour("--line")];
    const axis = { stroke: text, font: "12px system-ui, sans-serif", grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 } };
    return {
      width: this.element.clientWidth || 300,
      height: this.element.clientHeight || 200,
      scales: { x: { time: false } },
      cursor: { y: false },
      legend: { live: true },
      axes: [
        { ...axis, size: 34, space: 60, values: (_, ticks) => ticks.map(given.format) },
        { ...axis, size: 48, values: (_, ticks) => ticks.map(figure) },
      ],
      series: [
        { label: given.xLabel, value: (_, value) => (value === null ? "–" : given.format(value)) },
        ...given.series.map((each) => ({
          label: each.label,
          stroke: colour(each.colour),
          width: each.width ?? 2,
          spanGaps: true,
          points: { show: each.values.length < SMOOTH_FROM },
          value: (_, value) => figure(value),
        })),
      ],
    };
  }
}

// The series of a noisy figure: as it is, and once there are many points its running mean.
export function noisy(values) {
  if (values.length < SMOOTH_FROM) return [{ label: "a round", values, colour: "--accent" }];
  return [
    { label: "a round", values, colour: "--faint", width: 1 },
    { label: `mean of ${WINDOW}`, values: smoothed(values), colour: "--accent" },
  ];
}
