package main

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/throughline-mqtt/throughline/rules"
)

// reloadMetrics say how attempts to load the rule files go, the one at the start
// included.
type reloadMetrics struct {
	ok, last     prometheus.Gauge
	good, failed prometheus.Counter
}

func newReloadMetrics(r prometheus.Registerer) *reloadMetrics {
	m := &reloadMetrics{
		ok: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "throughline_rules_reload_ok", Help: "1: the last attempt to load the rule files succeeded; 0: the last good set is in force.",
		}),
		last: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "throughline_rules_reload_success_timestamp_seconds", Help: "When the rule files were last loaded, Unix time; 0: not since the start.",
		}),
	}
	attempts := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "throughline_rules_reloads_total", Help: "Attempts to load the rule files, the one at the start included, by result: ok, or failed, which changes nothing.",
	}, []string{"result"})
	m.good, m.failed = attempts.WithLabelValues("ok"), attempts.WithLabelValues("failed")
	r.MustRegister(m.ok, m.last, attempts)
	return m
}

func (m *reloadMetrics) count(r rules.Reload) {
	if !r.OK {
		m.ok.Set(0)
		m.failed.Inc()
		return
	}
	m.ok.Set(1)
	m.last.Set(float64(r.Time.Unix()))
	m.good.Inc()
}

// rulesInfo tells which set is in force. It is asked, so that no scrape sees two or
// none.
type rulesInfo struct {
	rules func() *rules.Set
	desc  *prometheus.Desc
}

func rulesInfoDesc() *prometheus.Desc {
	return prometheus.NewDesc("throughline_rules_info", "Always 1; generation names the content of the rule files in force.", []string{"generation"}, nil)
}

func (i *rulesInfo) Describe(ch chan<- *prometheus.Desc) { ch <- i.desc }

func (i *rulesInfo) Collect(ch chan<- prometheus.Metric) {
	ch <- prometheus.MustNewConstMetric(i.desc, prometheus.GaugeValue, 1, i.rules().Generation())
}
