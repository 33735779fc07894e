package bridge

import "time"

// LimitCall sets how long a call of o goes on.
func LimitCall(o *Operator, d time.Duration) { o.limit = d }
