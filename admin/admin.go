// Package admin is the HTTP side of the broker for its operators: liveness and
// readiness, Prometheus metrics, the rules in force and what waits in the outbox.
//
// It knows nothing of MQTT and holds no state of its own: everything it shows comes
// through the small interfaces of Options. It guards its door itself: a Host that
// it does not know is refused (DNS rebinding), a cross-origin change is refused
// (CSRF), and a token is asked for where one is configured.
package admin

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/rules"
)

// Options says what the API shows and who may see it.
type Options struct {
	// Hosts are the Host names answered to, besides localhost and the IP address
	// that a request came in on. Without port; compared without case.
	Hosts []string
	// Token is the bearer token that everything but /livez and /readyz asks for.
	// Empty: none, which is right for a loopback address alone.
	Token string
	// Ready returns nil while the broker's listeners accept and it is not draining.
	// It must never depend on a destination's health.
	Ready func() error
	// Metrics is what /metrics exposes.
	Metrics prometheus.Gatherer
	// Outbox lists, retries and purges records and dead letters, and pauses
	// destinations.
	Outbox Outbox
	// Rules is the rule set in force, and how to load it anew.
	Rules Rules
	// Logger gets one line a change, and failures to answer.
	Logger *slog.Logger
}

// Outbox is what the API needs of the durable queue.
type Outbox interface {
	List(f bridge.Filter, each func(bridge.Entry) bool) error
	Stats() bridge.Stats
	// Retry and Purge are as *bridge.Operator has them.
	Retry(ctx context.Context, c bridge.Change) (bridge.Changed, error)
	Purge(ctx context.Context, c bridge.Change) (bridge.Changed, error)
	// Destinations, Pause and Resume too.
	Destinations() []bridge.Status
	Pause(ctx context.Context, destination string) (bridge.Status, error)
	Resume(ctx context.Context, destination string) (bridge.Status, error)
}

// Rules is what the API needs of the rule files.
type Rules interface {
	Current() *rules.Set
	// Last is how the last attempt to load the files went.
	Last() rules.Reload
	// Reload loads the files anew. Unless it went well, nothing has changed.
	Reload() rules.Reload
}

type api struct {
	Options
	tokenHash [sha256.Size]byte
}

// New returns the handler of the whole API. It is safe for concurrent use.
func New(o Options) http.Handler {
	a := &api{Options: o, tokenHash: sha256.Sum256([]byte(o.Token))}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { plain(w, http.StatusOK, "ok\n") })
	mux.HandleFunc("GET /readyz", a.readyz)
	mux.Handle("GET /metrics", a.authorized(promhttp.HandlerFor(o.Metrics, promhttp.HandlerOpts{})))
	mux.Handle("GET /api/v1/outbox", a.authorized(http.HandlerFunc(a.outbox)))
	mux.Handle("GET /api/v1/outbox/stats", a.authorized(http.HandlerFunc(a.outboxStats)))
	mux.Handle("GET /api/v1/outbox/{id}", a.authorized(http.HandlerFunc(a.outboxShow)))
	mux.Handle("POST /api/v1/outbox/retry", a.authorized(a.outboxChange("retry", o.Outbox.Retry)))
	mux.Handle("POST /api/v1/outbox/purge", a.authorized(a.outboxChange("purge", o.Outbox.Purge)))
	mux.Handle("GET /api/v1/destinations", a.authorized(http.HandlerFunc(a.destinations)))
	mux.Handle("POST /api/v1/destinations/{name}/pause", a.authorized(a.changeDestination("paused", Pause)))
	mux.Handle("POST /api/v1/destinations/{name}/resume", a.authorized(a.changeDestination("resumed", Resume)))
	mux.Handle("GET /api/v1/rules", a.authorized(http.HandlerFunc(a.rules)))
	mux.Handle("POST /api/v1/rules/reload", a.authorized(http.HandlerFunc(a.reload)))
	sameOrigin := http.NewCrossOriginProtection()
	sameOrigin.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fail(w, http.StatusForbidden, "cross-origin request", "changes are taken from no other origin")
	}))
	return a.knownHost(sameOrigin.Handler(mux))
}

// Server returns an HTTP server for h with the time limits that a door to the
// network needs. The caller listens, serves and shuts it down.
func Server(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      60 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

func (a *api) readyz(w http.ResponseWriter, _ *http.Request) {
	if err := a.Ready(); err != nil {
		plain(w, http.StatusServiceUnavailable, "not ready: "+err.Error()+"\n")
		return
	}
	plain(w, http.StatusOK, "ok\n")
}

// knownHost refuses a request whose Host is none of ours: a web page that had its
// name rebound to this address sends its own name.
func (a *api) knownHost(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !a.knows(r) {
			fail(w, http.StatusMisdirectedRequest, "unknown host",
				"this API does not answer to Host "+quote(r.Host)+"; admin.hosts lists further names")
			return
		}
		next.ServeHTTP(w, r)
	})
}

func (a *api) knows(r *http.Request) bool {
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	if strings.EqualFold(host, "localhost") {
		return true
	}
	// An IP address cannot be rebound: it is known if the request came in on it.
	if ip, err := netip.ParseAddr(host); err == nil {
		local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
		if ok {
			if at, err := netip.ParseAddrPort(local.String()); err == nil && at.Addr().Unmap() == ip.Unmap() {
				return true
			}
		}
	}
	for _, h := range a.Hosts {
		if strings.EqualFold(host, h) {
			return true
		}
	}
	return false
}

func (a *api) authorized(next http.Handler) http.Handler {
	if a.Token == "" {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		given, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		hash := sha256.Sum256([]byte(given))
		if subtle.ConstantTimeCompare(hash[:], a.tokenHash[:]) != 1 || !ok {
			w.Header().Set("WWW-Authenticate", `Bearer realm="throughline"`)
			fail(w, http.StatusUnauthorized, "token required", "send Authorization: Bearer and the admin token")
			return
		}
		next.ServeHTTP(w, r)
	})
}

// problem is an error answer. RFC 9457.
type problem struct {
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail,omitempty"`
}

func fail(w http.ResponseWriter, status int, title, detail string) {
	write(w, status, "application/problem+json", problem{Title: title, Status: status, Detail: detail})
}

func plain(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write([]byte(text))
}

func answer(w http.ResponseWriter, status int, v any) { write(w, status, "application/json", v) }

func write(w http.ResponseWriter, status int, contentType string, v any) {
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // the client is gone if this fails
}

func quote(s string) string {
	b, _ := json.Marshal(s)
	return string(b)
}
