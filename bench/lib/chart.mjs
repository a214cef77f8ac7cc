import * as echarts from 'echarts';

const colours = { ours: '#2f6fde', theirs: '#9aa5b1' };

/** A horizontal bar chart of medians, the quickest on top, as SVG. */
export function chart(title, results) {
  const slowestFirst = [...results].sort((a, b) => b.median - a.median);
  const height = 110 + 34 * results.length;
  const picture = echarts.init(null, null, { renderer: 'svg', ssr: true, width: 860, height });
  picture.setOption({
    animation: false,
    backgroundColor: '#fff',
    title: { text: title, left: 16, top: 12, textStyle: { fontSize: 15 } },
    grid: { left: 16, right: 90, top: 48, bottom: 32, containLabel: true },
    xAxis: { type: 'value', name: 's', axisLabel: { formatter: (value) => String(value) } },
    yAxis: { type: 'category', data: slowestFirst.map(({ name }) => name), axisTick: { show: false } },
    series: [{ type: 'bar', barWidth: '60%', data: slowestFirst.map(bar) }],
  });
  const svg = picture.renderToSVGString();
  picture.dispose();
  return svg;
}

function bar({ name, median }) {
  return {
    value: median,
    itemStyle: { color: name.startsWith('thicken') ? colours.ours : colours.theirs },
    label: { show: true, position: 'right', formatter: formatSeconds(median) },
  };
}

export function formatSeconds(seconds) {
  return seconds < 1 ? `${(seconds * 1000).toPrecision(3)} ms` : `${seconds.toPrecision(3)} s`;
}
