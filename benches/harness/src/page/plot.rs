//! One plot of lines or points as an SVG text.

use std::fmt::{Display, Write};

use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;

/// Width and height, pixels.
const SIZE: (u32, u32) = (760, 400);
/// Told apart also by those who see no red or no green (Okabe and Ito, 2008).
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
];
/// Radius of a point.
const DOT: i32 = 3;

/// Values that belong together.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Series {
    pub(crate) name: String,
    /// Points from left to right if they are joined.
    pub(crate) points: Vec<(f64, f64)>,
    pub(crate) is_joined: bool,
}

/// What is drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Plot {
    pub(crate) title: String,
    pub(crate) x: &'static str,
    pub(crate) y: &'static str,
    /// Whether each tenfold is equally high.
    pub(crate) is_logarithmic: bool,
    pub(crate) series: Vec<Series>,
}

/// Why a plot was not drawn.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("drawing `{title}`: {what}")]
pub struct PlotError {
    title: String,
    what: String,
}

impl Plot {
    /// The plot as SVG, without anything from elsewhere.
    ///
    /// # Errors
    /// [`PlotError`] where there is no point that can be shown.
    pub fn svg(&self) -> Result<String, PlotError> {
        let wrong = |what: &dyn Display| PlotError { title: self.title.clone(), what: what.to_string() };
        let shown =
            |&(x, y): &(f64, f64)| x.is_finite() && y.is_finite() && (y > 0.0 || !self.is_logarithmic);
        let points: Vec<(f64, f64)> =
            self.series.iter().flat_map(|s| s.points.iter().copied()).filter(shown).collect();
        if points.is_empty() {
            return Err(wrong(&"expected a point at least, found none"));
        }
        let most = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).fold(f64::MIN, f64::max);
        let least = points.iter().map(|p| p.1).fold(f64::MAX, f64::min);
        let (x_end, y_end) = (most(|p| p.0).max(1e-9) * 1.04, most(|p| p.1).max(1e-9) * 1.1);
        let mut text = String::new();
        {
            let root = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
            let drawn = if self.is_logarithmic {
                self.draw(&root, 0.0..x_end, (least / 1.5..y_end * 1.5).log_scale())
            } else {
                self.draw(&root, 0.0..x_end, 0.0..y_end)
            };
            drawn.and_then(|()| root.present()).map_err(|e| wrong(&e))?;
        }
        Ok(text)
    }

    fn draw<'a, Y>(
        &self,
        root: &DrawingArea<SVGBackend<'a>, Shift>,
        x: std::ops::Range<f64>,
        y: Y,
    ) -> Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>
    where
        Y: AsRangedCoord<Value = f64>,
        Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(root)
            .caption(&self.title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(70)
            .build_cartesian_2d(x, y)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .x_desc(self.x)
            .y_desc(self.y)
            .x_label_formatter(&|value| shown(*value))
            .y_label_formatter(&|value| shown(*value))
            .draw()?;
        for (series, colour) in self.series.iter().zip(COLOURS.iter().cycle()) {
            let points = || series.points.iter().copied();
            if series.is_joined {
                chart.draw_series(LineSeries::new(points(), colour.stroke_width(2)))?;
            }
            chart
                .draw_series(points().map(|point| Circle::new(point, DOT, colour.filled())))?
                .label(&series.name)
                .legend(|(x, y)| Circle::new((x + 8, y), DOT + 1, colour.filled()));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .draw()
    }
}

/// A number of three digits, or all of a whole one.
fn shown(value: f64) -> String {
    let mut text = String::new();
    // writing to a String cannot fail
    let _ = match value.abs() {
        v if v >= 100.0 || v == v.round() => write!(text, "{value:.0}"),
        v if v >= 10.0 => write!(text, "{value:.1}"),
        _ => write!(text, "{value:.2}"),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(points: Vec<(f64, f64)>, is_logarithmic: bool) -> Plot {
        let series = vec![Series { name: "p50 <ms>".into(), points, is_joined: true }];
        Plot { title: "Latency & rate".into(), x: "requests/s", y: "ms", is_logarithmic, series }
    }

    #[test]
    fn a_plot_is_one_svg_with_its_points_and_words_escaped() {
        for is_logarithmic in [false, true] {
            let svg = plot(vec![(1.0, 10.0), (2.0, 12.0), (4.0, 900.0)], is_logarithmic).svg().unwrap();
            assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
            assert!(svg.contains("Latency &amp; rate") && svg.contains("p50 &lt;ms&gt;"), "{svg}");
            // three points and the one in the legend
            assert_eq!(svg.matches("<circle").count(), 4);
            assert!(svg.contains("<polyline"));
        }
    }

    #[test]
    fn nothing_to_draw_is_told() {
        let message = plot(vec![], false).svg().unwrap_err().to_string();
        assert!(message.contains("Latency & rate") && message.contains("a point at least"), "{message}");
        assert!(plot(vec![(1.0, 0.0)], true).svg().is_err());
        assert!(plot(vec![(0.0, 0.0)], false).svg().is_ok());
    }
}
