package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/throughline-mqtt/throughline/admin"
	"github.com/throughline-mqtt/throughline/auth"
	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/hooks"
	"github.com/throughline-mqtt/throughline/rules"
	"github.com/throughline-mqtt/throughline/store"
	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/skywalking"
)

// storeFile is the name of the data file in data_dir.
const storeFile = "throughline.db"

// app is the running broker. It is started from the disk outwards and stopped in
// the reverse order.
type app struct {
	log       *slog.Logger
	registry  *prometheus.Registry
	draining  atomic.Bool
	keeper    *rules.Keeper
	server    *hooks.Server
	adminLn   net.Listener
	stopAdmin func(context.Context) error
	flushes   func() store.Flushes
	failed    chan error // gets what ended the app from inside, once
	steps     []step     // in the order of stopping
}

// step is one named part of the stop.
type step struct {
	name  string
	bound time.Duration
	stop  func(context.Context) error
}

// startApp starts everything, and returns once clients can connect. If it fails,
// nothing is left running.
func startApp(ctx context.Context, cfg config, log *slog.Logger) (*app, error) {
	return startAppAround(ctx, cfg, log, nil)
}

// startAppAround is startApp, with what around returns between the forwarder and the outbox; nil: nothing.
func startAppAround(ctx context.Context, cfg config, log *slog.Logger, around func(bridge.Queue) bridge.Queue) (_ *app, err error) {
	a := &app{log: log, registry: prometheus.NewRegistry(), failed: make(chan error, 1)}
	a.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	defer func() {
		if err != nil {
			err = errors.Join(err, a.stop())
		}
	}()

	// What is started later is stopped earlier, but for the admin API, which answers to the end.
	tracer, err := a.startTracer(cfg.Trace)
	if err != nil {
		return nil, err
	}
	queue, err := a.openOutbox(cfg)
	if err != nil {
		return nil, err
	}
	// Before deliveries begin: no destination may be the admin API.
	if err := a.listenAdmin(ctx, cfg.Admin); err != nil {
		return nil, err
	}
	reread := rereader{log: log}
	var between bridge.Queue = queue
	if around != nil {
		between = around(queue)
	}
	forwarder, err := bridge.New(bridge.Options{
		Queue: between, Tracer: tracer, Unauthorized: reread.secrets, OwnAddresses: ownAddresses(a.adminAddress()),
		Logger: log, Registerer: a.registry,
	})
	if err != nil {
		return nil, err
	}
	stopSummary := startSummary(summarySources{
		stats: queue.Stats, destinations: forwarder.Destinations, attempts: forwarder.Attempts, flushes: a.flushes,
	}, log)
	a.onStop("forwarder", 15*time.Second, func(ctx context.Context) error {
		stopSummary()
		return forwarder.Stop(ctx)
	})
	if a.keeper, err = a.loadRules(cfg, queue, forwarder); err != nil {
		return nil, err
	}
	reread.keeper.Store(a.keeper)
	if err := a.startServer(cfg, forwarder, queue, tracer); err != nil {
		return nil, err
	}
	if cfg.Admin.Address != "" {
		a.startAdmin(cfg.Admin, bridge.NewOperator(queue, forwarder))
	}
	log.Info("broker is ready", "version", version(), "mqtt", a.server.Addresses(), "admin", a.adminAddress(),
		"rules", len(a.keeper.Current().Rules()), "records_waiting", queue.Stats().Records)
	return a, nil
}

// onStop adds a step to the stop, before those that were added so far.
func (a *app) onStop(name string, bound time.Duration, stop func(context.Context) error) {
	a.steps = append([]step{{name, bound, stop}}, a.steps...)
}

// stop ends everything in named steps. Each has a bound of its own and there is none
// over all of them, so that a slow step never takes the time of a later one.
func (a *app) stop() error {
	a.draining.Store(true)
	var errs []error
	for _, s := range a.steps {
		bounded, cancel := context.WithTimeout(context.Background(), s.bound)
		began := time.Now()
		err := s.stop(bounded)
		cancel()
		if err != nil {
			errs = append(errs, fmt.Errorf("stop %s: %w", s.name, err))
			a.log.Error("stopped", "step", s.name, "took", time.Since(began).Round(time.Millisecond), "error", err)
			continue
		}
		a.log.Info("stopped", "step", s.name, "took", time.Since(began).Round(time.Millisecond))
	}
	a.steps = nil
	return errors.Join(errs...)
}

func (a *app) openOutbox(cfg config) (*outbox.Outbox, error) {
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("create data_dir: %w", err)
	}
	st, err := store.Open(filepath.Join(cfg.DataDir, storeFile), store.Options{
		Buckets: outbox.Buckets(), Logger: a.log, Registerer: a.registry,
	})
	if err != nil {
		return nil, err
	}
	a.flushes = st.Flushes
	ctx, cancel := context.WithCancel(context.Background())
	a.onStop("outbox", 10*time.Second, func(bounded context.Context) error {
		cancel()
		return st.Close(bounded)
	})
	queue, err := outbox.Open(st, outbox.Options{
		MaxBytes:   cfg.Outbox.MaxBytes,
		Caps:       caps(cfg.Outbox, nil),
		Logger:     a.log,
		Registerer: a.registry,
	})
	if err != nil {
		return nil, err
	}
	if floor := a.minFree(cfg); floor > 0 {
		go queue.KeepFree(ctx, floor, func() (int64, error) {
			free, _, err := store.Space(cfg.DataDir)
			return free, err
		})
	}
	return queue, nil
}

// minFree is how much is to stay free on the file system of data_dir; 0: nothing.
func (a *app) minFree(cfg config) int64 {
	if cfg.Outbox.MinFree != defaultMinFree {
		return cfg.Outbox.MinFree
	}
	_, size, err := store.Space(cfg.DataDir)
	if err != nil {
		a.log.Warn("the size of the file system can't be told: publishes are taken until it is full, unless outbox.min_free is set", "error", err)
		return 0
	}
	return min(256<<20, size/20)
}

func (a *app) startTracer(c traceConfig) (*skywalking.Tracer, error) {
	o := skywalking.Options{Service: c.Service, Instance: c.Instance, Sample: c.Sample}
	if c.Collector != "" {
		const bound = 5 * time.Second
		r, err := skywalking.NewReporter(skywalking.ReporterOptions{
			Address: c.Collector, Token: c.Token, TLS: c.TLS, CloseTimeout: bound, Logger: a.log, Registerer: a.registry,
		})
		if err != nil {
			return nil, err
		}
		// Close flushes; what it loses is logged and counted. A dead collector is no reason to fail.
		a.onStop("tracer", bound, func(context.Context) error { r.Close(); return nil })
		o.Reporter = r
	}
	return skywalking.NewTracer(o)
}

// loadRules loads the rule files, and keeps the caps and the forwarder's destinations those of the set in force.
func (a *app) loadRules(cfg config, queue *outbox.Outbox, forwarder *bridge.Bridge) (*rules.Keeper, error) {
	var paths []string
	if cfg.Rules.Dir != "" {
		paths = []string{cfg.Rules.Dir}
	}
	metrics := newReloadMetrics(a.registry)
	told := func(r rules.Reload) {
		metrics.count(r)
		a.logReload(r)
	}
	load := ruleOptions(os.LookupEnv, cfg.Outbox.MaxBytes, true, ownAddresses(a.adminAddress()))
	load.Waiting = func() map[string]int { return waitingIn(queue.Stats()) }
	keeper, err := rules.OpenKeeper(rules.KeeperOptions{
		Paths:    paths,
		StateDir: cfg.DataDir,
		Watch:    cfg.Rules.Watch,
		Load:     load,
		Apply: func(s *rules.Set) {
			queue.Know(destinationNames(s)...)
			queue.SetCaps(caps(cfg.Outbox, s))
			forwarder.SetDestinations(destinations(s))
		},
		OnReload: told,
		Logger:   a.log,
	})
	if err != nil {
		return nil, err
	}
	a.registry.MustRegister(&rulesInfo{rules: keeper.Current, desc: rulesInfoDesc()})
	told(keeper.Last())
	a.onStop("rules", time.Second, func(context.Context) error { keeper.Close(); return nil })
	return keeper, nil
}

// logReload says how an attempt to load the rule files went, each problem in a line.
func (a *app) logReload(r rules.Reload) {
	for _, p := range r.Problems {
		level := slog.LevelWarn
		if p.Severity == rules.Error {
			level = slog.LevelError
		}
		a.log.Log(context.Background(), level, "rule file", "problem", p.String())
	}
	switch {
	case r.OK:
		a.log.Info("rules are in force", "generation", r.Generation)
	case r.Fallback:
		a.log.Error("the rule files are bad: running on the last good set, of before the start", "generation", r.Generation)
	default:
		a.log.Error("the rule files are bad: the last good set stays in force", "generation", r.Generation)
	}
	if r.Err != nil {
		a.log.Error("rules are in force, but their copy for a restart could not be kept", "error", r.Err)
	}
}

// ruleOptions are how rule files are read, in check as in serve: with what only
// the bridge can say of a destination. own are the broker's own addresses.
func ruleOptions(env func(string) (string, bool), outboxBytes int64, requireSecrets bool, own []netip.AddrPort) rules.LoadOptions {
	return rules.LoadOptions{
		LookupEnv: env, RequireSecrets: requireSecrets, OutboxBytes: outboxBytes,
		CheckTLS:     func(t rules.TLS) error { return bridge.TLS(t).Check() },
		CheckAddress: func(to netip.AddrPort, e rules.Egress) error { return bridge.Egress(e).Check(to, own) },
	}
}

// destinations turns what rule files say into what the bridge sends to.
func destinations(s *rules.Set) []bridge.Destination {
	var out []bridge.Destination
	for _, d := range s.Destinations() {
		headers, secrets := headersOf(d.Headers)
		var keys [][]byte
		for _, k := range d.SigningKeys {
			keys = append(keys, []byte(k.Reveal()))
		}
		out = append(out, bridge.Destination{
			Name: d.Name, URL: d.URL, Method: d.Method, Headers: headers, HeaderSecrets: secrets, Rendered: d.Rendered,
			TraceBody:      bridge.TraceFields(d.TraceBody),
			TraceHeaders:   d.TraceHeaders,
			SigningKeys:    keys,
			IdempotencyKey: d.IdempotencyKey,
			Basic:          basicOf(d.Basic),
			OAuth2:         oauth2Of(d.OAuth2),
			TLS:            bridge.TLS(d.TLS),
			Egress:         bridge.Egress(d.Egress),
			Concurrency:    d.Concurrency, Rate: bridge.Rate(d.Rate), Timeout: d.Timeout, MaxAge: d.MaxAge, LaneHold: d.LaneHold,
			Batch: bridge.Batch(d.Batch),
		})
	}
	return out
}

// headersOf are the headers that each request has, and the secrets of all, for those that were rendered.
func headersOf(all []rules.Header) (fixed map[string]string, secrets map[string][]string) {
	fixed, secrets = map[string]string{}, map[string][]string{}
	for _, h := range all {
		if !h.Rendered {
			fixed[h.Name] = h.Value.Reveal()
		}
		for _, s := range h.Secrets {
			secrets[h.Name] = append(secrets[h.Name], s.Reveal())
		}
	}
	return fixed, secrets
}

func basicOf(b *rules.Basic) *bridge.BasicAuth {
	if b == nil {
		return nil
	}
	return &bridge.BasicAuth{Username: b.Username.Reveal(), Password: b.Password.Reveal()}
}

func oauth2Of(o *rules.OAuth2) *bridge.OAuth2 {
	if o == nil {
		return nil
	}
	return &bridge.OAuth2{TokenURL: o.TokenURL, ClientID: o.ClientID.Reveal(), ClientSecret: o.ClientSecret.Reveal(), Scopes: o.Scopes}
}

// caps are what the configuration says, and, where it says more, the rule set; nil: none.
func caps(c outboxConfig, s *rules.Set) outbox.Caps {
	of := func(maxBytes int64, onFull string) outbox.Cap {
		return outbox.Cap{MaxBytes: maxBytes, Drop: onFull == rules.OnFullAckAndCount}
	}
	all := outbox.Caps{Default: of(c.MaxBytesPerDestination, c.OnFull), Of: map[string]outbox.Cap{}}
	if s == nil {
		return all
	}
	for _, d := range s.Destinations() {
		all.Of[d.Name] = of(cmp.Or(d.MaxBytes, c.MaxBytesPerDestination), cmp.Or(d.OnFull, c.OnFull))
	}
	return all
}

func (a *app) startServer(cfg config, forwarder *bridge.Bridge, queue *outbox.Outbox, tracer tracectx.Tracer) error {
	extractor, err := tracectx.NewExtractor(cfg.Trace.PayloadFields)
	if err != nil {
		return err
	}
	o := hooks.Options{
		MaxConnections:   cfg.Limits.MaxConnections,
		MaxPacketSize:    int(cfg.Limits.MaxPacketSize),
		ConnectTimeout:   cfg.Limits.ConnectTimeout,
		MaxSubscriptions: cfg.Limits.MaxSubscriptionsPerClient,
		Rules:            a.keeper.Current,
		Append:           func(recs []bridge.Record) (hooks.Commit, error) { return forwarder.Append(recs) },
		Space:            queue.Space(),
		Extractor:        extractor,
		Tracer:           tracer,
		Node:             cfg.Trace.Instance,
		Logger:           a.log,
		Registerer:       a.registry,
	}
	var of []auth.Listener
	for _, l := range cfg.Listeners {
		o.Listeners = append(o.Listeners, hooks.ListenerOptions{Name: l.Name, Address: l.Address})
		of = append(of, auth.Listener{Name: l.Name, Address: l.Address})
	}
	o.Broker = cfg.Listeners[0].Address
	o.Version = version()
	o.Auth = auth.NewPolicy(auth.Options{Anonymous: &cfg.Auth.Anonymous, Listeners: of})
	if a.server, err = hooks.New(o); err != nil {
		return err
	}
	a.onStop("server", 5*time.Second, a.server.Close)
	a.onStop("clients", 5*time.Second, a.server.DisconnectClients)
	a.onStop("listeners", time.Second, func(context.Context) error { a.server.StopAccepting(); return nil })
	a.server.Start()
	return nil
}

// listenAdmin takes the admin API's address; nobody is answered yet.
func (a *app) listenAdmin(ctx context.Context, c adminConfig) error {
	if c.Address == "" {
		return nil
	}
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", c.Address)
	if err != nil {
		return fmt.Errorf("admin API: %w", err)
	}
	a.adminLn = ln
	a.stopAdmin = func(context.Context) error { return ln.Close() }
	a.steps = append(a.steps, step{"admin", 2 * time.Second, func(ctx context.Context) error { return a.stopAdmin(ctx) }})
	return nil
}

// ownAddresses is an address of ours as no destination may have it; nil if it is
// none, or one by name.
func ownAddresses(address string) []netip.AddrPort {
	a, err := netip.ParseAddrPort(address)
	if err != nil || a.Port() == 0 {
		return nil
	}
	return []netip.AddrPort{a}
}

func (a *app) startAdmin(c adminConfig, queue *bridge.Operator) {
	s := admin.Server(admin.New(admin.Options{
		Hosts: c.Hosts, Token: c.Token, Ready: a.ready, Metrics: a.registry, Outbox: queue, Rules: a.keeper, Logger: a.log,
	}), a.log)
	go func() {
		if err := s.Serve(a.adminLn); !errors.Is(err, http.ErrServerClosed) {
			select {
			case a.failed <- fmt.Errorf("admin API: %w", err):
			default:
			}
		}
	}()
	a.stopAdmin = s.Shutdown
}

// ready is nil while clients can connect. It says nothing about destinations: a
// failing webhook must not take vehicles off the broker.
func (a *app) ready() error {
	switch {
	case a.draining.Load():
		return errors.New("stopping")
	case !a.server.Accepting():
		return errors.New("listeners don't accept")
	}
	return nil
}

// mqttAddress is where the first listener accepts.
func (a *app) mqttAddress() string { return a.server.Addresses()[0] }

// adminAddress is where the admin API answers, "" without one.
func (a *app) adminAddress() string {
	if a.adminLn == nil {
		return ""
	}
	return a.adminLn.Addr().String()
}
